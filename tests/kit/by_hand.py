"""QEMU as a user starts it, without snaptree: with ``-drive`` or ``-blockdev``, node names given or generated."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
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


SNAPTREE = "snaptree"
WHO = (SNAPTREE, *(pytest.param(way, marks=pytest.mark.slow) for way in ("drive", "blockdev")))
"""Who starts a machine: snaptree, or a person in one of these ways."""


def by_hand(stage: Stage, way: str, tips: Mapping[str, Path] | None = None) -> Guest:
    """Start QEMU as a user might, on the machine's disks, without snaptree.

    :param tips: where the disks are by now; without it, as they were made.
    """
    words = stage.boot.words(stage.folder)
    for disk, path in (tips or {"vda": stage.disks / "vda.qcow2", "vdb": stage.disks / "vdb.raw"}).items():
        form = "raw" if path.suffix == ".raw" else "qcow2"
        text = WAYS[way].format(disk=disk, name=path.name, path=path, format=form)
        address = guest.device(disk, "").partition(",addr=")[2]
        words += [*text.split()[:-1], f"{text.split()[-1]},addr={address}"]
    words += ["-qmp", f"unix:{stage.folder}/qmp,server=on,wait=off"]
    return guest.launch(words, stage.folder, stage.disks)


def add(stage: Stage, who: str, words: str) -> None:
    """Look after the machine that somebody is to start."""
    if who == SNAPTREE:
        stage(f"add web1 {words} --start {shlex.quote(stage.boot.command(stage.folder))}")
        return
    stage.monitor = stage.folder / "qmp"
    stage(f"add web1 {words} --qmp {stage.monitor}")


def start(stage: Stage, who: str, at: int = 0) -> None:
    """Have it started on its tips, and let its guest write.

    :param at: the last record that is on them.
    """
    if who == SNAPTREE:
        stage("start web1")
    else:
        stage.guest = by_hand(
            stage, who, {disk: stage.path(stage.show()["active_branch"], disk) for disk in guest.DISKS}
        )
        with stage.qmp():
            pass
    stage.guest.go(at)


def begin(stage: Stage, who: str, *, raw: bool = True) -> None:
    """Make the machine's disks, look after it, and have it started."""
    stage.make(raw=raw)
    add(stage, who, f"--disk vda=vda.qcow2 --disk vdb={'vdb.raw,format=raw' if raw else 'vdb.qcow2'}")
    start(stage, who)
