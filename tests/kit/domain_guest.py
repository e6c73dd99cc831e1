"""A domain that boots the tests' Linux guest."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.kit import guest
from tests.kit.domain import DomainScene
from tests.kit.guest import Guest


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
