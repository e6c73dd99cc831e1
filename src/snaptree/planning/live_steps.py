"""The steps that a running machine's QEMU takes, as data; ``planning/steps.py`` has the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Cut:
    """One disk of a live snapshot: from now on the guest writes to ``overlay``, on ``tip``."""

    disk: str
    tip: str
    overlay: str


@dataclass(frozen=True, slots=True)
class LiveSnapshot:
    """Let a running machine's disks go on in their new overlays, all at one instant.

    Whether it has happened QEMU says; when QEMU has died the overlays are taken as the tips, which is right either way.
    """

    kind: ClassVar[str] = "live-snapshot"
    crash: ClassVar[str] = (
        "the guest writes to the tips or to the overlays, on all disks alike; an overlay that QEMU has in its graph is "
        "kept, and so are all when QEMU is gone"
    )

    cuts: tuple[Cut, ...]

    @property
    def summary(self) -> str:
        return "freeze " + ", ".join(each.tip for each in self.cuts) + " at one instant; the guest runs on"
