"""What libvirt is asked and told of a domain's memory; ``calls.py`` has all else.

A memory is an ordinary save image of libvirt's. The calls that save or load one last as long as that takes; libvirt
goes on with one by itself when its client is gone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress

from snaptree.errors import BusyError, RefusedError, UnhealthyError
from snaptree.model.live import PAUSED, RUNNING
from snaptree.model.memory import LIBVIRT, Saveable
from snaptree.store.libvirt import xml
from snaptree.store.libvirt.binding import binding, explain, explained
from snaptree.store.libvirt.calls import DomainHandle
from snaptree.store.libvirt.jobs import hint_for, jobs, require_here, require_short
from snaptree.store.libvirt.requests import snapshot_request, targets
from snaptree.store.libvirt.xml import Element

IDLE_SECONDS = 600.0
"""So long libvirt may go on with what a client that was killed had it begin, without a sign of progress."""
POLL_SECONDS = 0.05
_BOOTS_FROM = ("os/kernel", "os/initrd", "os/dtb", "os/loader")


class DomainMemory:
    """The memory of one domain."""

    def __init__(self, handle: DomainHandle) -> None:
        self._handle = handle
        self._domain = handle._domain
        self._libvirt = binding()

    # ---- asking ---------------------------------------------------------------------------------------------------

    def saveable(self) -> Saveable:
        """How much there is to be saved. Whether it can be libvirt says when it is to, with nothing changed then."""
        with explained(f"ask how much memory domain {self._handle.name} has"):
            ram = int(self._domain.info()[1]) << 10
            try:
                used = int(self._domain.memoryStats().get("rss", 0)) << 10
            except self._libvirt.libvirtError:
                used = 0
        return Saveable(ram, min(used or ram, ram), {}, (LIBVIRT,))

    def written(self) -> int | None:
        """How many bytes of the memory have been saved so far; ``None`` where nothing is known."""
        try:
            stats = self._domain.jobStats()
        except self._libvirt.libvirtError:
            return None
        done = stats.get("memory_processed", stats.get("data_processed"))
        return int(done) if done is not None else None

    def stands_for_snapshot(self) -> bool:
        """Whether libvirt has the guest stand still just now, for a snapshot."""
        return self._handle.stands_for(self._libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT)

    def stands_still(self) -> bool:
        """Whether the guest stands still."""
        return self._handle.state() == PAUSED

    def may_have_run(self) -> bool:
        """Whether a domain that is off may have run since libvirt turned it off with a snapshot, by what it says."""
        libvirt = self._libvirt
        with explained(f"ask what domain {self._handle.name} does"):
            why = self._domain.state()[1]
        # What failed to start has not run; a libvirtd that was started anew does not know.
        halted = (libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT, libvirt.VIR_DOMAIN_SHUTOFF_FAILED)
        return why not in (*halted, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN)

    def settle(self) -> None:
        """Wait until libvirt is at nothing with the domain that a client which was killed may have had it begin.

        :raise BusyError: it is all the while, or it is at what somebody else has begun, and that may last.
        """
        libvirt = self._libvirt
        until, last = time.monotonic() + IDLE_SECONDS, None
        while time.monotonic() < until:
            try:
                # While a domain is being started this call waits, for half a minute at the most.
                info = self._domain.jobInfo()
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_OPERATION_TIMEOUT:
                    require_here(self._handle)
                    return
            else:
                if info[0] == libvirt.VIR_DOMAIN_JOB_NONE:
                    return
                require_short(self._handle)
                if info[4] != last:
                    until, last = time.monotonic() + IDLE_SECONDS, info[4]
            time.sleep(POLL_SECONDS)
        name = self._handle.name
        why = next(iter(jobs(self._handle)), "something is under way")
        raise BusyError(f"libvirt is at work on domain {name} all the while: {why}", hint_for(name))

    def definition(self, path: str, disks: Mapping[str, tuple[str, str]] | None = None) -> str:
        """The domain that is in a memory file, as it is to be when that is loaded.

        :param disks: the files that its disks are to begin on; without it those that they began on.
        :raise UnhealthyError: the file is none of libvirt's, or something is gone that the domain had then.
        :raise RefusedError: it is of another domain, or of one with other disks.
        """
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE
        try:
            text = str(self._handle.connection._connection.saveImageGetXMLDesc(path, flags))
        except libvirt.libvirtError as error:
            raise UnhealthyError(f"{path} is no memory that libvirt can read: {error}") from error
        root = xml.parse(text, f"the domain in {path}")
        if root.findtext("uuid") != self._handle.uuid:
            raise RefusedError(
                f"{path} is the memory of another domain, {root.findtext('name')}", "put back the one that was there"
            )
        if (name := root.findtext("name")) != self._handle.name:
            raise RefusedError(
                f"{path} is the memory of this domain when its name was {name}, and libvirt loads it under no other",
                f"give it that name back ('virsh domrename {self._handle.name} {name}', when it is off), or go back "
                "without the memory: --no-memory",
            )
        self._put_disks(root, path, disks)
        return xml.text_of(root)

    def _put_disks(self, root: Element, path: str, disks: Mapping[str, tuple[str, str]] | None) -> None:
        resolve = self._handle.connection.volume
        found = dict(xml.disks(root))
        hint = "go back without the memory: --no-memory"
        for target, disk in found.items():
            place = (disks or {}).get(target)
            file = xml.path_of(disk, resolve)
            if place is not None:
                xml.put_source(disk, *place, resolve)
                continue
            xml.strip_chain(disk)
            if disks is not None and file is not None and not xml.why_left(disk, resolve):
                raise RefusedError(f"{path} is of a domain that had disk {target}, which is none of these now", hint)
            may_lack = disk.find("source") is not None and disk.find("source").get("startupPolicy") is not None
            if file is not None and not os.path.exists(file) and not may_lack:
                raise UnhealthyError(f"{path} is of a domain with {file}, which is not there", hint)
        for target in sorted(set(disks or {}) - set(found)):
            raise RefusedError(f"{path} is of a domain that had no disk {target}", hint)
        for element in _BOOTS_FROM:
            file = root.findtext(element)
            if file and not os.path.exists(file):
                raise UnhealthyError(f"{path} is of a domain with {file}, which is not there", hint)

    # ---- telling --------------------------------------------------------------------------------------------------

    def save(self, name: str, path: str, overlays: Mapping[str, str]) -> None:
        """Save the memory, and let the disks go on in overlays that are there already, all of one instant; the guest
        stands still meanwhile. libvirt writes a record of the name.

        :param path: a file that is there already: libvirt fills it.
        """
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        with explained(f"save the memory of domain {self._handle.name}"):
            self._domain.snapshotCreateXML(self._request(name, path, overlays), flags)

    def park(self, name: str, path: str) -> None:
        """Save the memory, and turn the domain off; its disks stay as they are. libvirt writes a record of the name."""
        flags = self._libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_HALT
        with explained(f"save the memory of domain {self._handle.name}"):
            self._domain.snapshotCreateXML(self._request(name, path, {}), flags)

    def _request(self, name: str, path: str, overlays: Mapping[str, str]) -> str:
        root = snapshot_request(self._handle.definition(live=True), overlays)
        memory = xml.etree().Element("memory", snapshot="external", file=path)
        root.insert(0, memory)
        xml.put_text(root, "name", name)
        return xml.text_of(root)

    def cancel(self) -> None:
        """End the saving: the guest goes on, and the call that began it fails."""
        with suppress(self._libvirt.libvirtError):
            self._domain.abortJob()

    def restore(self, path: str, text: str, state: str) -> None:
        """Start the domain from a memory file.

        :param text: what :meth:`definition` gave.
        :param state: what it does then, ``running`` or ``paused``.
        """
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_SAVE_RUNNING if state == RUNNING else libvirt.VIR_DOMAIN_SAVE_PAUSED
        with explained(f"load {path} into domain {self._handle.name}"):
            self._handle.connection._connection.restoreFlags(path, text, flags)

    # ---- memory within an image -----------------------------------------------------------------------------------

    def mark(self, name: str, disks: Collection[str]) -> None:
        """Take an internal snapshot on these disks, which are all; libvirt saves the memory with it, and writes a
        record."""
        root = xml.etree().Element("domainsnapshot")
        xml.put_text(root, "name", name)
        xml.etree().SubElement(root, "memory", snapshot="internal")
        element = xml.etree().SubElement(root, "disks")
        for target in targets(self._handle.definition(live=True)):
            xml.etree().SubElement(element, "disk", name=target, snapshot="internal" if target in disks else "no")
        with explained(f"take a snapshot of domain {self._handle.name}"):
            self._domain.snapshotCreateXML(xml.text_of(root), 0)

    def load_within(self, name: str, state: str) -> None:
        """Start the domain from the memory that is within an image, as it was defined then."""
        libvirt = self._libvirt
        running = state == RUNNING
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING if running else libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED
        with explained(f"load the memory of snapshot {name!r}"):
            self._domain.revertToSnapshot(self._domain.snapshotLookupByName(name, 0), flags)

    def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot, with all that there is of it; one that is not there is deleted already."""
        libvirt = self._libvirt
        try:
            self._domain.snapshotLookupByName(name, 0).delete(0)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
                raise explain(libvirt, error, f"delete snapshot {name!r}") from error
