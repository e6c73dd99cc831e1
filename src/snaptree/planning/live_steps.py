"""The steps that a running machine's QEMU takes, as data; ``planning/steps.py`` has the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeAlias

from msgspec import Struct

from snaptree.model.sizes import readable

File: TypeAlias = tuple[str, str]
"""One image in a chain: ``(path, format)``."""


class Kept(Struct, frozen=True):
    """A copy of a piece of firmware state: ``live`` is where the machine has it, ``copy`` where the copy is."""

    role: str
    live: str
    copy: str


class Cut(Struct, frozen=True):
    """One disk of a live snapshot: from now on the guest writes to ``overlay``, on ``tip``."""

    disk: str
    tip: str
    overlay: str


class Mark(Struct, frozen=True):
    """One disk of a live snapshot whose point stays in its tip, as the internal snapshot ``tag``."""

    disk: str
    path: str
    tag: str


def frozen(cuts: Sequence[Cut], marks: Sequence[Mark]) -> str:
    """What a live snapshot does to the disks, in words."""
    cut = ["freeze " + ", ".join(each.tip for each in cuts)] if cuts else []
    marked = [f"take the internal snapshot {each.tag!r} in {each.path}" for each in marks]
    return " and ".join([*cut, *marked])


class LiveSnapshot(Struct, frozen=True):
    """Let a running machine's disks go on in their new overlays, or after an internal snapshot, all at one instant.

    Whether it has happened QEMU says; when QEMU has died the overlays are taken as the tips, which is right either way,
    unless an internal snapshot is missing: then it has not happened on any disk. With ``quiesce`` the guest's agent
    freezes its file systems around the instant, and they are thawed however snaptree dies; ``agent`` is its socket, if
    not the one that QEMU tells. ``firmware`` are copies that have been made just before: what has changed since is
    copied once more, while the guest stands still for it.
    """

    kind: ClassVar[str] = "live-snapshot"
    crash: ClassVar[str] = (
        "the guest writes to the tips or to the overlays, on all disks alike; an overlay that QEMU has in its graph is "
        "kept, and so are all when QEMU is gone; where an internal snapshot is missing the others go; frozen file "
        "systems are thawed, and a guest that stands still goes on, by a process that stands by, or by recovery"
    )

    cuts: tuple[Cut, ...]
    quiesce: bool = False
    agent: str | None = None
    marks: tuple[Mark, ...] = ()
    firmware: tuple[Kept, ...] = ()

    @property
    def about(self) -> str:
        """The file by which the journal's notes on it are kept."""
        return self.cuts[0].tip if self.cuts else self.marks[0].path

    @property
    def summary(self) -> str:
        how = " with the guest's file systems quiesced" if self.quiesce else ""
        return f"{frozen(self.cuts, self.marks)} at one instant{how}; the guest runs on"


class LiveOpen(Struct, frozen=True):
    """Have a running machine's QEMU open for writing layers that it only reads, whose internal snapshots it is to
    delete: whether it can shows only when it does."""

    kind: ClassVar[str] = "live-open"
    crash: ClassVar[str] = (
        "QEMU has the layers open for reading or for writing, and writes nothing; recovery has it open them for "
        "reading again"
    )

    paths: tuple[str, ...]

    @property
    def summary(self) -> str:
        return "have QEMU open " + ", ".join(self.paths) + " for writing"


class LiveJob(Struct, frozen=True):
    """One merge of layers that a running machine has open, done by its QEMU.

    ``row`` is the chain to merge, lowest first; ``below`` what the lowest stands on, nearest first. ``child`` is what
    stands on the row in QEMU, ``None`` when the row's highest layer is the tip that the guest writes to. A commit into
    which the guest's tip goes is *active*: afterwards the guest writes to ``row[0]``. ``bytes`` is what will be copied,
    ``zeroes`` what is written as zeroes without copying, ``profile`` the cumulative bytes at equal steps over the
    guest's address range.
    """

    way: str
    disk: str
    row: tuple[File, ...]
    below: tuple[File, ...]
    child: File | None
    bytes: int
    zeroes: int = 0
    profile: tuple[int, ...] = ()

    @property
    def active(self) -> bool:
        """Whether the guest goes over to another file."""
        return self.way == "commit" and self.child is None

    @property
    def target(self) -> File:
        """The file that takes the data."""
        return self.row[0] if self.way == "commit" else self.row[-1]

    @property
    def gone(self) -> tuple[File, ...]:
        """The files that QEMU has no use for afterwards."""
        return self.row[1:] if self.way == "commit" else self.row[:-1]


class LiveMerge(Struct, frozen=True):
    """Let a running machine's QEMU merge layers, all disks at once.

    Every job comes so far that nothing is left to be copied; then what it has copied is flushed, and it is finalized,
    which takes the merged layers out of QEMU's graph and writes the header that no longer names them.
    """

    kind: ClassVar[str] = "live-merge"
    crash: ClassVar[str] = (
        "pull: the upper layer holds more clusters and shows the same; commit: the lower layer is half-merged and is "
        "read only through the one above; the job runs on in QEMU, is found by its name and finished, and when QEMU is "
        "gone the headers and the journal say how far it had come"
    )

    jobs: tuple[LiveJob, ...]

    @property
    def summary(self) -> str:
        parts = [
            f"{job.way} {readable(job.bytes)} of {job.disk} "
            + (f"down into {job.target[0]}" if job.way == "commit" else f"up into {job.target[0]}")
            + " in the running machine"
            for job in self.jobs
        ]
        return "; ".join(parts)


class Swap(Struct, frozen=True):
    """One disk of a live swap: what was built takes the place of ``row[-1]``, under ``child``, on ``below``.

    ``row`` is lowest first, ``below`` what its lowest stands on, nearest first.
    """

    disk: str
    row: tuple[File, ...]
    below: tuple[File, ...]
    child: File

    @property
    def upper(self) -> str:
        """The file that is replaced."""
        return self.row[-1][0]


class LiveSwap(Struct, frozen=True):
    """Have a running machine's QEMU read what was built, under its hidden name, instead of the row.

    It comes before the rename: what QEMU refuses it refuses while nothing has changed.
    """

    kind: ClassVar[str] = "live-swap"
    crash: ClassVar[str] = (
        "QEMU reads the row or what was built of it, which shows the same; recovery has it read the row again"
    )

    swaps: tuple[Swap, ...]

    @property
    def summary(self) -> str:
        return "have QEMU read what was built instead of " + ", ".join(each.upper for each in self.swaps)


class LiveSettle(Struct, frozen=True):
    """Have a running machine's QEMU open what is in place now by its name, and close what was merged."""

    kind: ClassVar[str] = "live-settle"
    crash: ClassVar[str] = (
        "QEMU has the merged file open under its hidden name of before or under its own; recovery goes on until it has "
        "it under its own"
    )

    swaps: tuple[Swap, ...]

    @property
    def summary(self) -> str:
        return "have QEMU open " + ", ".join(each.upper for each in self.swaps) + " by name, and close what was merged"
