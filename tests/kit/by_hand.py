"""QEMU as a user starts it, without snaptree: with ``-drive`` or ``-blockdev``, node names given or generated."""

from __future__ import annotations

import os

from tests.kit import guest
from tests.kit.guest import Guest
from tests.kit.stage import Stage

WAYS = {
    "drive": "-drive file={path},format={format},if=none,id=d-{disk} -device virtio-blk-pci,drive=d-{disk}",
    "drive, relative": "-drive file={name},format={format},if=none,id=d-{disk} -device virtio-blk-pci,drive=d-{disk}",
    "blockdev": "-blockdev driver={format},node-name=n-{disk},file.driver=file,file.filename={path} "
    "-device virtio-blk-pci,drive=n-{disk}",
    "blockdev, two nodes": "-blockdev driver=file,node-name=f-{disk},filename={path},discard=unmap "
    "-blockdev driver={format},node-name=n-{disk},file=f-{disk} -device virtio-blk-pci,drive=n-{disk}",
    "throttled": "-object throttle-group,id=t-{disk} -blockdev driver={format},node-name=n-{disk},file.driver=file,"
    "file.filename={path} -blockdev driver=throttle,node-name=t-{disk},throttle-group=t-{disk},file=n-{disk} "
    "-device virtio-blk-pci,drive=t-{disk}",
}

QUICK = ("drive, relative", "throttled")
"""Those that are run by default."""


def by_hand(stage: Stage, way: str) -> Guest:
    """Start QEMU as a user might, on the machine's disks, without snaptree."""
    words = stage.boot.words(stage.folder)
    for disk, name, form in (("vda", "vda.qcow2", "qcow2"), ("vdb", "vdb.raw", "raw")):
        text = WAYS[way].format(disk=disk, name=name, path=stage.disks / name, format=form)
        address = guest.device(disk, "").partition(",addr=")[2]
        words += [*text.split()[:-1], f"{text.split()[-1]},addr={address}"]
    os.chdir(stage.disks)
    return guest.launch([*words, "-qmp", f"unix:{stage.folder}/qmp,server=on,wait=off"], stage.folder)
