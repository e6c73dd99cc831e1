"""Domains that boot the tests' Linux guest."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.kit import guest, images
from tests.kit.domain import DomainScene
from tests.kit.guest import DISKS, Guest
from tests.kit.records import DISK_BYTES, read_records
from tests.kit.scene import names_in, points_of, standing_on


def booting(domain: DomainScene, initramfs: Path, *disks: str, devices: str = "") -> Guest:
    """Define the domain, off, with these disks (as :meth:`DomainScene.define` has them) and the guest's console."""
    # libvirt gives what a domain uses to its own user.
    place = domain.folder / "guest"
    place.mkdir()
    place.chmod(0o777)
    shutil.copy(guest.kernel(), place / "kernel")
    shutil.copy(initramfs, place / "initramfs")
    log = f"<log file='{place}/console.log' append='on'/>"
    console = f"<serial type='unix'><source mode='bind' path='{place}/console'/>{log}</serial>"
    domain.define(*disks, devices=f"{console}{devices}<memballoon model='none'/>")
    text = (domain.folder / "domain.xml").read_text().replace("<memory unit='MiB'>64<", "<memory unit='MiB'>96<")
    boot = f"<kernel>{place}/kernel</kernel><initrd>{place}/initramfs</initrd>"
    boot += "<cmdline>console=ttyS0 quiet panic=1 no_timer_check</cmdline></os>"
    domain.define_xml(text.replace("</os>", boot))
    return Guest(place)


class Written:
    """A domain whose guest writes records to ``vda`` (qcow2) and ``vdb`` (raw)."""

    def __init__(self, domain: DomainScene, initramfs: Path) -> None:
        self.web = domain
        images.create(domain.disks / "vda.qcow2", DISK_BYTES)
        images.create(domain.disks / "vdb.raw", DISK_BYTES, "raw")
        self.guest = booting(domain, initramfs, "vda=vda.qcow2", "vdb=vdb.raw")

    def start(self) -> None:
        """Start it, and let the guest write."""
        self.web.virsh("start", "@")
        self.guest.wait_for("R", lambda lines: "R 2" in lines)
        self.guest.go()

    def holds(self, name: str) -> tuple[int, ...]:
        """How many records the name holds on each disk: on all at one instant."""
        shown = self.web.show()
        found = []
        for disk, point in sorted(points_of(names_in(shown)[name]).items()):
            chain = standing_on(point["path"], shown)
            found.append(read_records(images.read_unlocked(chain), DISKS.index(disk)).prefix)
        assert len(found) == 1 or 0 <= found[0] - found[1] <= 1, f"{name} is of two instants: {found}"
        return tuple(found)
