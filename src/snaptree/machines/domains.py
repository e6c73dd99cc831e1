"""Finding libvirt's domains by name, UUID or id."""

from __future__ import annotations

from snaptree.errors import ToolError
from snaptree.machines.libvirt import LibvirtMachine
from snaptree.model.machine import LIBVIRT, MachineConfig
from snaptree.store import trees
from snaptree.store.database import Database
from snaptree.store.libvirt.binding import binding, chosen_uri, usual_uri
from snaptree.store.libvirt.calls import DomainHandle, Libvirt, connected


def connect(uri: str | None, kept: MachineConfig | None = None) -> Libvirt | None:
    """The connection that was named; otherwise the one that a domain was last reached by, or that of a running daemon.

    ``None`` where nothing was named and no libvirt can be asked.

    :raise SnaptreeError: the one that was named cannot be used.
    """
    named = chosen_uri(uri) or (kept.uri if kept is not None else None)
    if named is not None:
        return connected(named)
    usual = usual_uri()
    if usual is None:
        return None
    try:
        binding()
    except ToolError:
        return None
    return connected(usual)


def find(database: Database, word: str, uri: str | None) -> LibvirtMachine | None:
    """A domain by name, UUID or id; ``None`` when there is none, or no libvirt can be asked.

    :raise SnaptreeError: libvirt cannot be asked, and should be.
    """
    kept = trees.find_config(database, word)
    libvirt = connect(uri, kept)
    if libvirt is None:
        return None
    return _machine(database, libvirt.find(word))


def find_kept(database: Database, kept: MachineConfig) -> LibvirtMachine | None:
    """The domain of which this is kept, whatever it is called now; ``None`` when it is gone.

    :raise SnaptreeError: libvirt cannot be asked.
    """
    libvirt = connect(kept.uri)
    return _machine(database, libvirt.find(kept.uuid)) if libvirt is not None and kept.uuid is not None else None


def _machine(database: Database, handle: DomainHandle | None) -> LibvirtMachine | None:
    return LibvirtMachine(database, handle, _name(database, handle)) if handle is not None else None


def every(database: Database, uri: str | None) -> tuple[LibvirtMachine, ...]:
    """All domains of the connection, by name; none where no libvirt can be asked."""
    libvirt = connect(uri)
    handles = libvirt.domains() if libvirt is not None else ()
    return tuple(LibvirtMachine(database, each, _name(database, each)) for each in handles)


def is_named(uri: str | None) -> bool:
    """Whether the user has named a connection."""
    return chosen_uri(uri) is not None


def why_none(uri: str | None) -> str:
    """Why no libvirt was asked for a domain; empty where one was."""
    if is_named(uri):
        return ""
    if usual_uri() is None:
        return "no libvirt runs here"
    try:
        binding()
    except ToolError as error:
        return f"{error.message}: {error.hint}"
    return ""


def _name(database: Database, handle: DomainHandle) -> str:
    """By what the domain is known here: its name, unless that means something else already."""
    kept = trees.find_config(database, handle.name)
    if kept is None or (kept.provider == LIBVIRT and (handle.uuid == kept.uuid or kept.uri == handle.connection.uri)):
        return handle.name
    return handle.uuid
