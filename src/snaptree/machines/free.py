"""Whether images are free to be looked after: nobody owns them, stands on them or has them open."""

from __future__ import annotations

import os

from msgspec.structs import replace

from snaptree.errors import BusyError, ExistsError, RefusedError
from snaptree.images.locks import probe, who_has_open
from snaptree.model.survey import LayerFacts
from snaptree.planning.adopt import FoundDisk
from snaptree.store import trees
from snaptree.store.database import Database


def require_free(database: Database, disk: FoundDisk, *, adopt: bool, monitor: str | None = None) -> None:
    """Refuse a disk whose files belong to a machine, under whatever name, or that a program has open for writing.

    :param monitor: the monitor of the QEMU that has the disk already, and may.
    :raise ExistsError: a machine owns one of the files.
    :raise RefusedError: a machine stands on one of them.
    :raise BusyError: a program has one open for writing.
    """
    owned = [*(disk.chain if adopt else disk.chain[:1]), *(chain[0] for chain in disk.siblings)]
    wanted = {
        (facts.identity.device, facts.identity.inode): facts.path for facts in owned if facts.identity is not None
    }
    for path, machine, is_owned in trees.layers_of_all(database):
        try:
            status = os.stat(path)
        except OSError:
            continue
        mine = wanted.get((status.st_dev, status.st_ino))
        hint = "make an overlay on it (qemu-img create -b) and add that"
        if mine is not None and is_owned:
            raise ExistsError(f"{mine} belongs to machine {machine!r}", hint)
        if mine is not None:
            raise RefusedError(f"machine {machine!r} stands on {mine}, and would see every change of it", hint)
    for facts in owned:
        conflict = probe(facts.path)
        if conflict is not None and conflict.writing and not (monitor and _has_as_disk(monitor, facts, disk)):
            who = ", ".join(who_has_open((facts.path,)).get(facts.path, ())) or "another process"
            raise BusyError(f"{facts.path} is open for writing by {who}", "stop it, then try again")


def _has_as_disk(monitor: str, facts: LayerFacts, disk: FoundDisk) -> bool:
    """Whether the QEMU at the monitor has the image as a disk, on just the chain that was found.

    :raise UnhealthyError: it has it on another chain.
    """
    import asyncio

    from snaptree.machines.asking import stands_on

    return facts is disk.chain[0] and asyncio.run(stands_on(monitor, [each.path for each in disk.chain]))


def require_plugged_in(machine: str, disk: FoundDisk, monitor: str) -> None:
    """Refuse a disk that a running machine has not: from then on its QEMU would have other disks than the tree says.

    :raise RefusedError: it has not, or only reads it.
    :raise UnhealthyError: it has it on another chain.
    """
    if not _has_as_disk(monitor, disk.chain[0], disk):
        hint = "plug it into the machine first (blockdev-add, device_add), or stop the machine"
        raise RefusedError(f"machine {machine} is running, and has not {disk.chain[0].path} as a disk", hint)


def without_others(database: Database, disk: FoundDisk) -> FoundDisk:
    """The disk without overlays beside it that belong to another machine."""
    siblings = tuple(
        chain for chain in disk.siblings if not any(trees.owners_of(database, each.path) for each in chain)
    )
    return replace(disk, siblings=siblings)
