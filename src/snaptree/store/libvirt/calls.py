"""The one module that calls libvirt. Its errors become ours here, and it prints none by itself.

Official calls only: nothing goes past libvirt to a QEMU that it runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from snaptree.errors import BusyError, NotFoundError, RefusedError, SnaptreeError, ToolError
from snaptree.model.live import OFF, PAUSED, RUNNING
from snaptree.store.libvirt import xml

SOCKETS = ("libvirt-sock", "virtqemud-sock")
"""What a libvirt daemon that could be asked listens on."""
Result = TypeVar("Result")


def binding() -> Any:
    """libvirt's Python binding.

    :raise ToolError: it is not installed.
    """
    try:
        import libvirt
    except ImportError as error:
        hint = "install snaptree[libvirt], or your distribution's python3-libvirt"
        raise ToolError("libvirt's Python binding is not installed", hint) from error
    # It would print every error, also those that are expected.
    libvirt.registerErrorHandler(lambda context, error: None, None)
    return libvirt


def chosen_uri(wanted: str | None = None) -> str | None:
    """The connection that the user has named, by option or by ``LIBVIRT_DEFAULT_URI``; ``None`` without."""
    return wanted or os.environ.get("LIBVIRT_DEFAULT_URI") or None


def usual_uri() -> str | None:
    """The connection to use where none was named: that of a daemon that runs; ``None`` where none does.

    Merely to find out whether there are domains, none is started.
    """
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    for folder, uri in (("/run/libvirt", "qemu:///system"), (os.path.join(own, "libvirt"), "qemu:///session")):
        if os.path.isabs(folder) and any(os.access(os.path.join(folder, each), os.W_OK) for each in SOCKETS):
            return uri
    return None


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Turn what libvirt says into an error of ours.

    :param doing: what was to be done, for the message: ``cannot DOING``.
    """
    libvirt = binding()
    try:
        yield
    except libvirt.libvirtError as error:
        raise _explain(libvirt, error, doing) from error


def _explain(libvirt: Any, error: Any, doing: str) -> SnaptreeError:
    code, text = error.get_error_code(), " ".join(str(error.get_error_message() or error).split())
    said = f"cannot {doing}: {text}"
    if code in (libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED, libvirt.VIR_ERR_AUTH_UNAVAILABLE):
        return RefusedError(said, "use sudo, or join the group that may use libvirt")
    if code in (libvirt.VIR_ERR_ACCESS_DENIED, libvirt.VIR_ERR_OPERATION_DENIED):
        return RefusedError(said, "use sudo, or join the group that may use libvirt")
    if "Permission denied" in text:
        return RefusedError(said, "use sudo, or join the group that may use libvirt")
    if code in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT):
        return NotFoundError(said, "see 'virsh list --all'")
    if code in (libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_BLOCK_COPY_ACTIVE):
        return BusyError(said, "see 'virsh domjobinfo', and try again")
    if code == libvirt.VIR_ERR_OPERATION_INVALID and "job" in text:
        return BusyError(said, "see 'virsh domjobinfo', and try again")
    if code in (libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN):
        return ToolError(said, "is the name right? 'virsh -c URI list' tells")
    if code in (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_INTERNAL_ERROR):
        return ToolError(said, "is libvirtd running? see 'systemctl status libvirtd' and its log")
    return ToolError(said, "see the log of libvirtd")


COMMIT = "commit"


@dataclass(frozen=True, slots=True)
class BlockJob:
    """A block job: ``commit`` (of a tip, which is to be pivoted) or another kind; figures in bytes."""

    kind: str
    current: int
    total: int

    @property
    def ready(self) -> bool:
        """Whether nothing is left to be copied but what is written meanwhile."""
        return self.total > 0 and self.current == self.total


class Libvirt:
    """A connection to libvirt.

    :raise ToolError: the binding is missing, or libvirt does not answer.
    :raise RefusedError: we may not use it, or its machines are not QEMU's.
    """

    def __init__(self, uri: str) -> None:
        self._libvirt = binding()
        with _explained(f"connect to libvirt at {uri}"):
            self._connection = self._libvirt.open(uri)
            kind = str(self._connection.getType())
            self.uri = uri
        if kind.upper() != "QEMU":
            self.close()
            raise RefusedError(
                f"the machines at {uri} are not QEMU's: its driver is {kind}", "name another connection with --connect"
            )

    def close(self) -> None:
        """End the connection."""
        try:
            self._connection.close()
        except self._libvirt.libvirtError:
            return

    def domains(self) -> tuple[DomainHandle, ...]:
        """All domains, running or not, by name."""
        with _explained("list the domains"):
            found = self._connection.listAllDomains()
            return tuple(sorted((DomainHandle(self, each) for each in found), key=lambda each: each.name))

    def find(self, word: str) -> DomainHandle | None:
        """A domain by name, UUID or (if it runs) id; ``None`` when there is none."""
        tries: list[Callable[[], Any]] = [
            lambda: self._connection.lookupByName(word),
            lambda: self._connection.lookupByUUIDString(word),
        ]
        if word.isdigit():
            tries.append(lambda: self._connection.lookupByID(int(word)))
        expected = (
            self._libvirt.VIR_ERR_NO_DOMAIN,
            self._libvirt.VIR_ERR_INVALID_ARG,
            self._libvirt.VIR_ERR_INTERNAL_ERROR,
        )
        for each in tries:
            try:
                return DomainHandle(self, each())
            except self._libvirt.libvirtError as error:
                if error.get_error_code() not in expected:
                    raise _explain(self._libvirt, error, f"look for domain {word!r}") from error
        return None

    def volume(self, pool: str, name: str) -> str | None:
        """The path of a volume of a storage pool; ``None`` where it has none."""
        try:
            return str(self._connection.storagePoolLookupByName(pool).storageVolLookupByName(name).path())
        except self._libvirt.libvirtError:
            return None


def _targets(definition: str) -> tuple[str, ...]:
    return tuple(target for target, _ in xml.disks(xml.parse(definition, "the domain's definition")))


class DomainHandle:
    """One domain, to be asked and told."""

    def __init__(self, connection: Libvirt, domain: Any) -> None:
        self.connection = connection
        self._libvirt = binding()
        self._domain = domain

    @property
    def name(self) -> str:
        """The domain's name."""
        return str(self._domain.name())

    @property
    def uuid(self) -> str:
        """The domain's UUID."""
        return str(self._domain.UUIDString())

    # ---- asking ---------------------------------------------------------------------------------------------------

    def state(self) -> str:
        """``off``, ``running`` or ``paused``."""
        libvirt = self._libvirt
        with _explained(f"ask what domain {self.name} does"):
            number = self._domain.state()[0]
        if number in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED):
            return OFF
        return PAUSED if number in (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED) else RUNNING

    def is_persistent(self) -> bool:
        """Whether it outlives its QEMU."""
        with _explained(f"read domain {self.name}"):
            return bool(self._domain.isPersistent())

    def is_saved(self) -> bool:
        """Whether it has a managed save image, from which the next start goes on, on the disks of then."""
        with _explained(f"read domain {self.name}"):
            return bool(self._domain.hasManagedSaveImage(0))

    def definition(self, *, secure: bool = False, live: bool = False) -> str:
        """The XML from which it is started next, or (``live``) of what runs.

        :param secure: with passwords, without which it cannot be defined again.
        """
        flags = 0 if live else self._libvirt.VIR_DOMAIN_XML_INACTIVE
        flags |= self._libvirt.VIR_DOMAIN_XML_SECURE if secure else 0
        with _explained(f"read the definition of domain {self.name}"):
            return str(self._domain.XMLDesc(flags))

    def records(self, *, secure: bool = False) -> dict[str, str]:
        """The XML of each snapshot's record, by name."""
        flags = self._libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE if secure else 0
        with _explained(f"read the snapshots of domain {self.name}"):
            return {str(each.getName()): str(each.getXMLDesc(flags)) for each in self._domain.listAllSnapshots(0)}

    def current(self) -> str | None:
        """The name of the snapshot that libvirt takes for current."""
        with _explained(f"read the snapshots of domain {self.name}"):
            if not self._domain.hasCurrentSnapshot(0):
                return None
            return str(self._domain.snapshotCurrent(0).getName())

    def record(self, name: str) -> str:
        """The XML of one snapshot's record.

        :raise NotFoundError: there is none of that name.
        """
        with _explained(f"read snapshot {name!r} of domain {self.name}"):
            return str(self._domain.snapshotLookupByName(name, 0).getXMLDesc(0))

    def jobs(self) -> tuple[str, ...]:
        """What libvirt is at with it: a migration, a save, block jobs, each as a sentence."""
        libvirt = self._libvirt
        if self.state() == OFF:
            return ()
        found: list[str] = []
        with _explained(f"ask what jobs domain {self.name} has"):
            kind = self._domain.jobInfo()[0]
            if kind != libvirt.VIR_DOMAIN_JOB_NONE:
                found.append("a job (a migration, a save or a backup) is under way")
            for target in _targets(self.definition(live=True)):
                try:
                    job = self._domain.blockJobInfo(target, 0)
                except libvirt.libvirtError:
                    continue
                if job:
                    found.append(f"a block job on {target} is under way")
        return tuple(found)

    def chains(self) -> dict[str, tuple[str, ...]]:
        """The files of each disk, top first, canonical: of what runs, or (the tips at least) of what is to be."""
        root = xml.parse(self.definition(live=self.state() != OFF), "the domain's definition")
        found: dict[str, tuple[str, ...]] = {}
        for target, disk in xml.disks(root):
            chain: list[str] = []
            at = disk
            while at is not None and (path := xml.path_of(at, self.connection.volume)) is not None:
                chain.append(path)
                at = at.find("backingStore")
            found[target] = tuple(chain)
        return found

    def block_job(self, target: str) -> BlockJob | None:
        """What goes on with a disk, if anything."""
        libvirt = self._libvirt
        try:
            info = self._domain.blockJobInfo(target, 0)
        except libvirt.libvirtError:
            return None
        if not info:
            return None
        kind = COMMIT if info["type"] == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT else "other"
        return BlockJob(kind, int(info["cur"]), int(info["end"]))

    # ---- telling --------------------------------------------------------------------------------------------------

    def define(self, text: str) -> None:
        """Give it another definition."""
        with _explained(f"define domain {self.name}"):
            self.connection._connection.defineXML(text)

    def redefine(self, text: str, name: str, *, current: bool = False) -> None:
        """Put a record in the place of that of the same name, or beside the others; nothing else is touched.

        That it is as libvirt's schema has it the tests see to: when libvirt does so it takes 70 ms instead of 5.
        """
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if current else 0
        with _explained(f"write the record of snapshot {name!r}"):
            self._domain.snapshotCreateXML(text, flags)

    def forget_record(self, name: str) -> None:
        """Drop a record and nothing else; one that is not there is dropped already."""
        libvirt = self._libvirt
        try:
            snapshot = self._domain.snapshotLookupByName(name, 0)
            snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
                raise _explain(libvirt, error, f"drop the record of snapshot {name!r}") from error

    def undefine(self, *, nvram: bool) -> None:
        """Have libvirt forget it with all its records; with ``nvram`` its UEFI variables go as well."""
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        flags |= libvirt.VIR_DOMAIN_UNDEFINE_NVRAM if nvram else libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
        with _explained(f"undefine domain {self.name}"):
            self._domain.undefineFlags(flags)

    def start(self, *, paused: bool) -> None:
        """Start it."""
        with _explained(f"start domain {self.name}"):
            self._domain.createWithFlags(self._libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)

    # ---- what runs ------------------------------------------------------------------------------------------------

    def cut(self, overlays: Mapping[str, str], *, quiesce: bool) -> None:
        """Let the disks go on in overlays that are there already, all at one instant; the others stay as they are."""
        libvirt = self._libvirt
        root = xml.etree().Element("domainsnapshot")
        disks = xml.etree().SubElement(root, "disks")
        running = xml.parse(self.definition(live=True), "the domain's definition")
        if mixed := xml.out_of_order(running):
            raise RefusedError(
                f"libvirt would take {mixed} of domain {self.name} for another disk: it was defined without its bus",
                "shut the domain down and start it again: from then on libvirt knows its disks' order",
            )
        for target, now in xml.disks(running):
            disk = xml.etree().SubElement(
                disks, "disk", name=target, snapshot="external" if target in overlays else "no"
            )
            if target in overlays:
                disk.set("type", "file")
                xml.etree().SubElement(disk, "driver", type="qcow2")
                source = xml.etree().SubElement(disk, "source", file=overlays[target])
                source.extend(xml.clone(each) for each in now.findall("source/seclabel"))
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE if quiesce else 0
        with _explained(f"take a snapshot of domain {self.name}"):
            self._domain.snapshotCreateXML(xml.text_of(root), flags)

    def commit(self, target: str, base: str, top: str, speed: int, *, active: bool, relative: bool) -> None:
        """Begin to merge layers down into the base.

        :param speed: bytes a second; 0 for no limit.
        :param active: the top is the tip: the guest goes over when it is told to (:meth:`pivot`).
        :param relative: the backing name that is written is relative, as those that are there.
        """
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
        flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if active else 0
        flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_RELATIVE if relative and not active else 0
        with _explained(f"merge {top} into {base}"):
            self._domain.blockCommit(target, base, top, speed, flags)

    def pull(self, target: str, base: str | None, speed: int) -> None:
        """Begin to merge into the tip all that is above the base, or all."""
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_BLOCK_REBASE_BANDWIDTH_BYTES
        flags |= libvirt.VIR_DOMAIN_BLOCK_REBASE_RELATIVE if base is not None else 0
        with _explained(f"merge layers into the tip of {target}"):
            try:
                self._domain.blockRebase(target, base, speed, flags)
            except libvirt.libvirtError as error:
                # On absolute names, such as virsh writes, it does not go by relative ones.
                absolute = (libvirt.VIR_ERR_CONFIG_UNSUPPORTED, libvirt.VIR_ERR_OPERATION_INVALID)
                if base is None or error.get_error_code() not in absolute:
                    raise
                self._domain.blockRebase(target, base, speed, libvirt.VIR_DOMAIN_BLOCK_REBASE_BANDWIDTH_BYTES)

    def pivot(self, target: str) -> None:
        """Let the guest go over to what its tip was merged into; whether it can yet libvirt knows."""
        libvirt = self._libvirt
        try:
            self._domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_BLOCK_COPY_ACTIVE:
                raise _explain(libvirt, error, f"end the merge of {target}") from error

    def limit(self, target: str, speed: int) -> None:
        """Let so many bytes a second move from now on; 0 for no limit."""
        libvirt = self._libvirt
        with suppress(libvirt.libvirtError):
            self._domain.blockJobSetSpeed(target, speed, libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES)

    def abort(self, target: str) -> None:
        """End what goes on with a disk, if anything does."""
        with suppress(self._libvirt.libvirtError):
            self._domain.blockJobAbort(target, 0)

    def flush(self) -> float:
        """Have its QEMU bring to disk all that it keeps, by stopping the guest for a moment; for how many seconds."""
        since = time.monotonic()
        with _explained(f"stop domain {self.name} for a moment"):
            self._domain.suspend()
            try:
                return time.monotonic() - since
            finally:
                self._domain.resume()

    def stop(self) -> None:
        """Turn it off, as by pulling the plug."""
        with _explained(f"turn domain {self.name} off"):
            self._domain.destroy()
