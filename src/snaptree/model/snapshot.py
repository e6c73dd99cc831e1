"""Snapshots: named points in time."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from msgspec import Struct, field

from snaptree.model.layer import Point


class FirmwareFile(Struct, frozen=True):
    """A copy of one piece of firmware state: ``role`` is ``nvram`` or ``tpm``, ``path`` where the copy is."""

    role: str
    path: str


class Snapshot(Struct, frozen=True):
    """A named point in time of the whole machine.

    ``points`` holds one point for each disk that the snapshot has; an excluded disk has none. ``memory`` names a
    :class:`~snaptree.model.memory.Memory`. ``created`` is in seconds since the epoch. ``consistency`` is how the
    guest's file systems were when it was taken: ``off`` (machine off), ``crash``, ``quiesced``, ``memory``.
    """

    name: str
    parent: str | None
    points: Mapping[str, Point]
    created: float
    description: str = ""
    consistency: str = "off"
    memory: int | None = None
    firmware: tuple[FirmwareFile, ...] = ()
    config: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def kind(self) -> str:
        """``external``, ``internal`` or ``mixed``."""
        internals = sum(1 for point in self.points.values() if point.internal is not None)
        if internals == 0:
            return "external"
        return "internal" if internals == len(self.points) else "mixed"
