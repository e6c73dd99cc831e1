"""Branches: named lines of work."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from snaptree.model.layer import Point
from snaptree.model.snapshot import FirmwareFile


class Branch(Struct, frozen=True):
    """A named line of work: one tip per disk.

    ``tips`` are whole layers; a parked branch may have an internal point instead. ``parent`` is the snapshot that the
    branch grew from: the latest one taken on it, or the one that it was grown from. ``firmware`` is set while parked.
    """

    name: str
    parent: str | None
    tips: Mapping[str, Point]
    created: float
    memory: int | None = None
    firmware: tuple[FirmwareFile, ...] = ()
