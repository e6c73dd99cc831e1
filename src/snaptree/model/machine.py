"""What is remembered of a machine besides its tree."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

STANDALONE, LIBVIRT = "standalone", "libvirt"
"""Who runs a machine: its user, or snaptree for them, with a QEMU of its own; or libvirt."""


class Due(Struct, frozen=True):
    """What a machine is to do that is turned off for an operation: ``after`` once that is done, ``before`` otherwise.

    ``since`` is the number of the last operation before that one, and ``done`` says that it is. ``definition`` is that
    of a domain, in whose place libvirt puts an older one with the memory that it loads.
    """

    before: str
    after: str
    since: int
    done: bool = False
    definition: str | None = None


class MachineConfig(Struct, frozen=True):
    """One machine as it was added.

    ``bases`` are foreign files outside the disks' folders that the user allowed with ``--base``. ``nvram`` and ``tpm``
    are the machine's firmware state, ``qmp`` the monitor socket of a machine that somebody else starts, ``start`` the
    command that starts it, and ``folder`` the folder that it is run in. ``agent`` is the socket of its guest's
    agent, where its QEMU does not tell it. Of a libvirt domain ``uri`` is the connection that has it, and ``uuid`` says
    which it is. ``due`` is what it is to do, while it is off only for an operation. ``keys`` are the files with
    the keys of encrypted layers, by their LUKS ids (``LayerFacts.luks``).
    """

    name: str
    provider: str = STANDALONE
    bases: tuple[str, ...] = ()
    nvram: str | None = None
    tpm: str | None = None
    qmp: str | None = None
    start: str | None = None
    folder: str | None = None
    created: float = 0.0
    agent: str | None = None
    uri: str | None = None
    uuid: str | None = None
    due: Due | None = None
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def firmware(self) -> tuple[tuple[str, str], ...]:
        """``(role, path)`` of each piece of live firmware state that the machine has."""
        pieces = (("nvram", self.nvram), ("tpm", self.tpm))
        return tuple((role, path) for role, path in pieces if path is not None)
