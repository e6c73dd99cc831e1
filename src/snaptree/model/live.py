"""A machine that runs, as a value: what was found out from its monitor."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from snaptree.model.layer import LayerId
from snaptree.model.memory import Saveable

OFF, RUNNING, PAUSED, UNKNOWN = "off", "running", "paused", "unknown"


class Live(Struct, frozen=True):
    """The QEMU that has the active tips open.

    ``state`` is ``running`` or ``paused``. ``open`` are the layers that it has open, tips and all beneath them;
    of ``reopenable`` it is known how it has opened them, of ``unnamed`` it has made up the nodes' names, of ``tracked``
    it keeps dirty bitmaps. ``commands`` is what its monitor can be asked for. ``files`` are all files that it has open,
    by device and inode, ``disks`` those of them that its devices have as their disks. ``memory`` is set where that was
    asked for, as it takes a while. ``backups`` are the names of backup jobs, not of ours, by the disks that they copy,
    ``jobs`` those of any such jobs that work on what a device has as its disk. ``astray`` are the layers of disks that
    it has stacked otherwise than the tree knows them, as after a merge by hand, with a sentence that says so.
    One that has ``let_go`` of its disks, having saved its memory, uses them only when
    the guest goes on. A ``transient`` one libvirt forgets when it ends, with all that it knew of its disks.
    """

    state: str
    pid: int
    open: frozenset[LayerId] = frozenset()
    commands: frozenset[str] = frozenset()
    reopenable: frozenset[LayerId] = frozenset()
    unnamed: frozenset[LayerId] = frozenset()
    tracked: frozenset[LayerId] = frozenset()
    files: frozenset[tuple[int, int]] = frozenset()
    disks: frozenset[tuple[int, int]] = frozenset()
    memory: Saveable | None = None
    let_go: bool = False
    transient: bool = False
    backups: Mapping[str, str] = field(default_factory=dict)
    jobs: Mapping[str, str] = field(default_factory=dict)
    astray: Mapping[LayerId, str] = field(default_factory=dict)
