"""Whether QEMU's programs can open what is encrypted, before the first step is taken.

A wrong key shows only when an image is opened. In the middle of an operation it would keep from undoing that, too.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress

from snaptree.errors import UnhealthyError
from snaptree.images.gate import luks_id_at
from snaptree.images.qemu_img import Keys, require_opened
from snaptree.planning.memory_steps import GoOver
from snaptree.planning.steps import (
    ApplyInternal,
    BuildFromPoint,
    Cover,
    DeleteInternal,
    File,
    MakeInternal,
    Move,
    Shrink,
    Step,
)
from snaptree.running.holding import Holding


def require_keys(steps: Iterable[Step], keys: Keys, opened: Collection[tuple[int, int]], holding: Holding) -> None:
    """See that the keys of the layers that QEMU's programs are to open do open them; each key is tried once.

    :param opened: the files (device and inode) that the machine's own QEMU has open, and works on itself.
    :param holding: has the others locked.
    :raise NoKeyError: one does not, or is not known.
    """
    wanted: dict[File, None] = {}
    for step in steps:
        for file in _opened(step):
            # Another QEMU opens for itself what this one has.
            if isinstance(step, GoOver | BuildFromPoint) or _inode(file[0]) not in opened:
                wanted[file] = None
    with holding.lent(path for path, _ in wanted):
        require_files(wanted, keys)


def require_files(files: Iterable[File], keys: Keys) -> None:
    """See that the keys of these files do open them.

    :raise NoKeyError: one does not, or is not known.
    """
    tried: set[str] = set()
    for path, image_format in files:
        # What is not there yet is put on what is.
        with suppress(OSError, UnhealthyError):
            luks = luks_id_at(path) if image_format == "qcow2" else ""
            if luks and luks not in tried:
                require_opened(path, keys)
                tried.add(luks)


def _inode(path: str) -> tuple[int, int] | None:
    with suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None


def _opened(step: Step) -> Iterator[File]:
    """The images that QEMU's programs open for a step."""
    match step:
        case MakeInternal() | DeleteInternal():
            yield step.path, "qcow2"
        case ApplyInternal():
            yield step.path, "qcow2"
            yield from step.below
        case BuildFromPoint() if step.by_qemu:
            yield step.source, "qcow2"
            yield from step.below
        case Cover():
            yield from (*step.row, *step.below)
        case Shrink():
            yield step.path, step.format
            yield from step.below
        case GoOver() if step.load is not None:
            for chain in step.load.disks.values():
                yield from ((path, image_format) for _, path, image_format in chain)
        case Move():
            for job in step.jobs:
                yield from (*job.row, *job.below) if job.by_qemu else ()
        case _:
            return
