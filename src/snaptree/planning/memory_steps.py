"""The steps on a running machine's memory, as data; ``planning/steps.py`` has the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypeAlias

from msgspec import Struct

from snaptree.model.layer import LayerId
from snaptree.model.live import PAUSED
from snaptree.model.memory import Memory
from snaptree.model.sizes import readable
from snaptree.planning.live_steps import Cut, Kept, Mark, frozen


class SaveMemory(Struct, frozen=True):
    """Freeze a running machine's disks, as a live snapshot does, and save its memory, all of one instant.

    ``path`` is the memory file, with the owner of ``like``; ``forms`` are the forms to try, the best first; ``used`` is
    how many bytes that will be at the most. ``firmware`` is as for a live snapshot.
    """

    kind: ClassVar[str] = "save-memory"
    crash: ClassVar[str] = (
        "the guest runs on, on the tips or on the overlays, on all disks alike; the memory is a hidden file until it "
        "is whole; QEMU goes on writing it and recovery waits for that, unless snaptree died before the guest ran "
        "again, or QEMU did: then the memory and internal snapshots go, and overlays that are in use stay and are "
        "merged later"
    )

    cuts: tuple[Cut, ...]
    path: str
    like: str
    forms: tuple[str, ...]
    used: int
    marks: tuple[Mark, ...] = ()
    firmware: tuple[Kept, ...] = ()

    @property
    def summary(self) -> str:
        disks = frozen(self.cuts, self.marks)
        return f"{disks} and save memory ({readable(self.used)}) in {self.path}, of one instant"


Chain: TypeAlias = tuple[tuple[LayerId, str, str], ...]
"""The layers of a disk, ``(id, path, format)``, the tip first."""


class Save(Struct, frozen=True):
    """A memory that is saved while the guest waits: its file, whose owner that gets, the forms to try, its bytes."""

    path: str
    like: str
    forms: tuple[str, ...]
    used: int


class Load(Struct, frozen=True):
    """A QEMU that loads a memory beside the one of now: the stored ``command`` with these ``disks``, run in ``folder``;
    its monitor is at ``monitor`` until it takes over. ``firmware`` is put in the place of the live one first: the
    QEMU of now goes on with the files that it has open."""

    command: str
    folder: str
    monitor: str
    disks: Mapping[str, Chain]
    memory: Memory
    firmware: tuple[Kept, ...] = ()


class GoOver(Struct, frozen=True):
    """Let another QEMU, which has loaded a memory beside, take over from the one of now, or turn that one off.

    Before the old guest is touched all is loaded and compared. Then it stands still; with ``save`` its memory is saved;
    the new one goes on if ``after`` says so, and the old one ends. ``monitor`` is where the machine's monitor is to be.
    ``firmware`` are copies of the old one's state, brought up to date while it stands still.
    """

    kind: ClassVar[str] = "go-over"
    crash: ClassVar[str] = (
        "until the journal says that the new QEMU takes over, or that the old one is to end, the old guest goes on, "
        "and the new QEMU and the memory that was saved go; from then on the old one is ended, and a new one that has "
        "died without having written is loaded again; firmware state is the old one's again, or the new one's"
    )

    monitor: str
    after: str
    load: Load | None = None
    save: Save | None = None
    firmware: tuple[Kept, ...] = ()

    @property
    def summary(self) -> str:
        parts = []
        if self.load is not None:
            parts.append(f"load {self.load.memory.path} into another QEMU")
        if self.save is not None:
            parts.append(f"save the memory of now ({readable(self.save.used)}) in {self.save.path}")
        if self.load is None:
            return "; ".join([*parts, "end the machine's QEMU"])
        return "; ".join([*parts, "let it take over" + (", paused" if self.after == PAUSED else "")])
