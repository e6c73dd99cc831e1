"""What calls libvirt, with ``binding.py`` and ``memory.py``; nothing else does. Its errors become ours.

Official calls only: nothing goes past libvirt to a QEMU that it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from msgspec import Struct

from snaptree.errors import NotFoundError, RefusedError
from snaptree.model.live import OFF, PAUSED, RUNNING
from snaptree.store.libvirt import xml
from snaptree.store.libvirt.binding import binding, explain, explained, is_here
from snaptree.store.libvirt.requests import snapshot_request

Result = TypeVar("Result")


COMMIT, COPY = "commit", "copy"
_LONGEST_ID = len(str(1 << 31))


class BlockJob(Struct, frozen=True):
    """A block job: ``commit`` (of a tip) or ``copy``, which are to be pivoted, or another kind; figures in bytes."""

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
    :raise RefusedError: we may not use it, or its machines are not QEMU's, or not this host's.
    """

    def __init__(self, uri: str) -> None:
        self._libvirt = binding()
        with explained(f"connect to libvirt at {uri}"):
            self._connection = self._libvirt.open(uri)
            kind, where = str(self._connection.getType()), str(self._connection.getURI())
            self.uri = uri
        if not is_here(where):
            self.close()
            raise RefusedError(
                f"the machines at {uri} are another host's, and their disks' files cannot be worked on from here",
                "run snaptree on that host, or name another connection with --connect",
            )
        if kind.upper() != "QEMU":
            self.close()
            raise RefusedError(
                f"the machines at {uri} are not QEMU's: its driver is {kind}", "name another connection with --connect"
            )

    def is_alive(self) -> bool:
        """Whether it answers."""
        try:
            self._connection.getLibVersion()
        except self._libvirt.libvirtError:
            return False
        return True

    def close(self) -> None:
        """End the connection."""
        try:
            self._connection.close()
        except self._libvirt.libvirtError:
            return

    def domains(self) -> tuple[DomainHandle, ...]:
        """All domains, running or not, by name."""
        with explained("list the domains"):
            found = self._connection.listAllDomains()
            return tuple(sorted((DomainHandle(self, each) for each in found), key=lambda each: each.name))

    def find(self, word: str) -> DomainHandle | None:
        """A domain by name, UUID or (if it runs) id; ``None`` when there is none."""
        if not _can_be_asked(word):
            return None
        tries: list[Callable[[], Any]] = [
            lambda: self._connection.lookupByName(word),
            lambda: self._connection.lookupByUUIDString(word),
        ]
        if word.isascii() and word.isdigit() and len(word) <= _LONGEST_ID and int(word) < 1 << 31:
            tries.append(lambda: self._connection.lookupByID(int(word)))
        expected = (self._libvirt.VIR_ERR_NO_DOMAIN, self._libvirt.VIR_ERR_INVALID_ARG)
        for each in tries:
            try:
                return DomainHandle(self, each())
            except self._libvirt.libvirtError as error:
                if error.get_error_code() not in expected:
                    raise explain(self._libvirt, error, f"look for domain {word!r}") from error
        return None

    def volume(self, pool: str, name: str) -> str | None:
        """The path of a volume of a storage pool: empty for one on network storage, ``None`` for one not found."""
        try:
            path = str(self._connection.storagePoolLookupByName(pool).storageVolLookupByName(name).path())
        except self._libvirt.libvirtError:
            return None
        # An RBD image's is ``pool/image``, say.
        return path if os.path.isabs(path) else ""


def _can_be_asked(word: str) -> bool:
    """Whether the binding can ask for a name: bytes that are no text, it cannot."""
    try:
        return b"\0" not in word.encode()
    except UnicodeEncodeError:
        return False


_open: dict[tuple[int, str], Libvirt] = {}


def connected(uri: str) -> Libvirt:
    """This process's connection: making one takes as long as all that is asked for a deletion.

    :raise ToolError: the binding is missing, or libvirt does not answer.
    :raise RefusedError: we may not use it, or its machines are not QEMU's.
    """
    key = os.getpid(), uri
    found = _open.get(key)
    if found is None or not found.is_alive():
        found = _open[key] = Libvirt(uri)
    return found


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
        """``off``, ``running`` or ``paused``; one that libvirt does not know any more is off."""
        libvirt = self._libvirt
        try:
            number = self._domain.state()[0]
            active = number == libvirt.VIR_DOMAIN_CRASHED and self._domain.isActive()
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise explain(libvirt, error, f"ask what domain {self.name} does") from error
            return OFF
        if number == libvirt.VIR_DOMAIN_CRASHED:
            # <on_crash>preserve</on_crash>: its QEMU is there all the same, and stands still.
            return PAUSED if active else OFF
        if number == libvirt.VIR_DOMAIN_SHUTOFF:
            return OFF
        return PAUSED if number in (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED) else RUNNING

    def stands_for(self, reason: int) -> bool:
        """Whether the guest stands still for a reason of libvirt's (``VIR_DOMAIN_PAUSED_…``)."""
        with explained(f"ask what domain {self.name} does"):
            state, why = self._domain.state()[:2]
        return bool(state == self._libvirt.VIR_DOMAIN_PAUSED and why == reason)

    def stands_for_error(self) -> bool:
        """Whether QEMU has stopped the guest, a request of which has failed."""
        return self.stands_for(self._libvirt.VIR_DOMAIN_PAUSED_IOERROR)

    def has_ended_by_itself(self) -> bool:
        """Whether a domain that is off was shut down from within, saved or migrated, or has crashed."""
        libvirt = self._libvirt
        ends = [libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, libvirt.VIR_DOMAIN_SHUTOFF_SAVED]
        ends += [libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED]
        with explained(f"ask what domain {self.name} does"):
            return self._domain.state()[1] in ends

    def is_persistent(self) -> bool:
        """Whether it outlives its QEMU."""
        with explained(f"read domain {self.name}"):
            return bool(self._domain.isPersistent())

    def is_saved(self) -> bool:
        """Whether it has a managed save image, from which the next start goes on, on the disks of then."""
        with explained(f"read domain {self.name}"):
            return bool(self._domain.hasManagedSaveImage(0))

    def definition(self, *, secure: bool = False, live: bool = False) -> str:
        """The XML from which it is started next, or (``live``) of what runs.

        :param secure: with passwords, without which it cannot be defined again.
        """
        flags = 0 if live else self._libvirt.VIR_DOMAIN_XML_INACTIVE
        flags |= self._libvirt.VIR_DOMAIN_XML_SECURE if secure else 0
        with explained(f"read the definition of domain {self.name}"):
            return str(self._domain.XMLDesc(flags))

    def records(self, *, secure: bool = False) -> dict[str, str]:
        """The XML of each snapshot's record, by name."""
        flags = self._libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE if secure else 0
        with explained(f"read the snapshots of domain {self.name}"):
            return {str(each.getName()): str(each.getXMLDesc(flags)) for each in self._domain.listAllSnapshots(0)}

    def current(self) -> str | None:
        """The name of the snapshot that libvirt takes for current."""
        with explained(f"read the snapshots of domain {self.name}"):
            if not self._domain.hasCurrentSnapshot(0):
                return None
            return str(self._domain.snapshotCurrent(0).getName())

    def record(self, name: str) -> str:
        """The XML of one snapshot's record.

        :raise NotFoundError: there is none of that name.
        """
        with explained(f"read snapshot {name!r} of domain {self.name}"):
            return str(self._domain.snapshotLookupByName(name, 0).getXMLDesc(0))

    def chains(self) -> dict[str, tuple[str, ...]]:
        """The files of each disk, top first, canonical: of what runs, or (the tips at least) of what is to be; none of
        a domain that libvirt does not know any more."""
        try:
            root = xml.parse(self.definition(live=self.state() != OFF), "the domain's definition")
        except NotFoundError:
            return {}
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
        kinds = {
            libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: COMMIT,
            libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: COPY,
        }
        return BlockJob(kinds.get(info["type"], "other"), int(info["cur"]), int(info["end"]))

    def mirror(self, target: str) -> str | None:
        """The file that a disk is being copied to."""
        root = xml.parse(self.definition(live=True), "the domain's definition")
        for name, disk in xml.disks(root):
            mirror = disk.find("mirror")
            if name == target and mirror is not None:
                return xml.path_of(mirror, self.connection.volume)
        return None

    # ---- telling --------------------------------------------------------------------------------------------------

    def define(self, text: str) -> None:
        """Give it another definition."""
        with explained(f"define domain {self.name}"):
            self.connection._connection.defineXML(text)

    def annotate(self, tag: str, element: xml.Element) -> None:
        """Put an element of snaptree's into the metadata of one that runs, without defining it."""
        libvirt = self._libvirt
        kind, flags = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
        with explained(f"write the metadata of domain {self.name}"):
            self._domain.setMetadata(kind, xml.plain(element), f"snaptree-{tag}", xml.NAMESPACES[tag], flags)

    def redefine(self, text: str, name: str, *, current: bool = False) -> None:
        """Put a record in the place of that of the same name, or beside the others; nothing else is touched.

        That it is as libvirt's schema has it the tests see to: when libvirt does so it takes 70 ms instead of 5.
        """
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if current else 0
        with explained(f"write the record of snapshot {name!r}"):
            self._domain.snapshotCreateXML(text, flags)

    def forget_record(self, name: str) -> None:
        """Drop a record and nothing else; one that is not there is dropped already."""
        libvirt = self._libvirt
        try:
            snapshot = self._domain.snapshotLookupByName(name, 0)
            snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
                raise explain(libvirt, error, f"drop the record of snapshot {name!r}") from error

    def undefine(self, *, nvram: bool, tpm: bool) -> None:
        """Have libvirt forget it with all its records; with ``nvram`` its UEFI variables go as well, with ``tpm`` what
        its TPM holds."""
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        flags |= libvirt.VIR_DOMAIN_UNDEFINE_NVRAM if nvram else libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
        if xml.has_tpm(xml.parse(self.definition(), "the domain's definition")):
            flags |= libvirt.VIR_DOMAIN_UNDEFINE_TPM if tpm else libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM
        with explained(f"undefine domain {self.name}"):
            self._domain.undefineFlags(flags)

    def start(self, *, paused: bool) -> None:
        """Start it."""
        with explained(f"start domain {self.name}"):
            self._domain.createWithFlags(self._libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)

    # ---- what runs ------------------------------------------------------------------------------------------------

    def cut(self, overlays: Mapping[str, str], *, quiesce: bool) -> None:
        """Let the disks go on in overlays that are there already, all at one instant; the others stay as they are."""
        libvirt = self._libvirt
        root = snapshot_request(self.definition(live=True), overlays)
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE if quiesce else 0
        with explained(f"take a snapshot of domain {self.name}"):
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
        with explained(f"merge {top} into {base}"):
            self._by_relative_names(
                lambda keep: self._domain.blockCommit(target, base, top, speed, flags | keep),
                libvirt.VIR_DOMAIN_BLOCK_COMMIT_RELATIVE if relative and not active else 0,
            )

    def pull(self, target: str, base: str | None, speed: int) -> None:
        """Begin to merge into the tip all that is above the base, or all."""
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_BLOCK_REBASE_BANDWIDTH_BYTES
        with explained(f"merge layers into the tip of {target}"):
            self._by_relative_names(
                lambda keep: self._domain.blockRebase(target, base, speed, flags | keep),
                libvirt.VIR_DOMAIN_BLOCK_REBASE_RELATIVE if base is not None else 0,
            )

    def _by_relative_names(self, begin: Callable[[int], Any], relative: int) -> None:
        """Begin a job that goes by relative names.

        On absolute ones, such as virsh writes, libvirt does not do that, nor on a chain that it was told with a block
        copy: of that it does not know the names.
        """
        libvirt = self._libvirt
        try:
            begin(relative)
        except libvirt.libvirtError as error:
            unsupported = error.get_error_code() == libvirt.VIR_ERR_CONFIG_UNSUPPORTED
            if not relative or not (unsupported or "relative" in str(error)):
                raise
            begin(0)

    def copy(self, target: str, overlay: str, chain: Sequence[tuple[str, str]]) -> None:
        """Begin to copy what the tip itself has into an overlay that is there already.

        The guest goes over when it is told to (:meth:`pivot`). Then, and not before, are the files opened that the
        overlay stands on.

        :param chain: the files that the overlay stands on with their formats, nearest first, to the last.
        """
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW | libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
        flags |= libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        text = xml.text_of(xml.copied_disk(overlay, chain))
        with explained(f"copy the tip of {target} into {overlay}"):
            self._domain.blockCopy(target, text, {}, flags)

    def pivot(self, target: str) -> None:
        """Let the guest go over to what its tip was merged or copied into; whether it can yet libvirt knows."""
        libvirt = self._libvirt
        try:
            self._domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_BLOCK_COPY_ACTIVE:
                raise explain(libvirt, error, f"let {target} go over") from error

    def limit(self, target: str, speed: int) -> None:
        """Let so many bytes a second move from now on; 0 for no limit."""
        libvirt = self._libvirt
        with suppress(libvirt.libvirtError):
            self._domain.blockJobSetSpeed(target, speed, libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES)

    def abort(self, target: str) -> None:
        """End what goes on with a disk, if anything does."""
        with suppress(self._libvirt.libvirtError):
            self._domain.blockJobAbort(target, 0)

    def stand_still(self) -> None:
        """Let the guest stand still."""
        with explained(f"stop domain {self.name} for a moment"):
            self._domain.suspend()

    def go_on(self) -> None:
        """Let a guest go on that stands still."""
        if self.state() == PAUSED:
            with explained(f"let domain {self.name} go on"):
                self._domain.resume()

    def stop(self) -> None:
        """Turn it off, as by pulling the plug."""
        with explained(f"turn domain {self.name} off"):
            self._domain.destroy()
