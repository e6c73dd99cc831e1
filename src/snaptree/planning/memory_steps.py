"""The steps on a running machine's memory, as data; ``planning/steps.py`` has the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from snaptree.model.sizes import readable
from snaptree.planning.live_steps import Cut


@dataclass(frozen=True, slots=True)
class SaveMemory:
    """Freeze a running machine's disks under their new overlays and save its memory, all of one instant.

    ``path`` is the memory file, with the owner of ``like``; ``forms`` are the forms to try, the best first; ``used`` is
    how many bytes that will be at the most.
    """

    kind: ClassVar[str] = "save-memory"
    crash: ClassVar[str] = (
        "the guest runs on, on the tips or on the overlays, on all disks alike; the memory is a hidden file until it "
        "is whole; QEMU goes on writing it and recovery waits for that, unless snaptree died before the guest ran "
        "again, or QEMU did: then the memory goes, and overlays that are in use stay and are merged later"
    )

    cuts: tuple[Cut, ...]
    path: str
    like: str
    forms: tuple[str, ...]
    used: int

    @property
    def summary(self) -> str:
        tips = ", ".join(each.tip for each in self.cuts)
        return f"freeze {tips} and save memory ({readable(self.used)}) in {self.path}, of one instant"
