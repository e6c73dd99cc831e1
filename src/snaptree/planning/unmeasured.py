"""What a verb asks for when the survey lacks figures."""

from __future__ import annotations

from snaptree.model.layer import LayerId, Point


class Unmeasured(Exception):
    """A verb needs figures that the survey does not have: read them and ask again.

    ``rows`` are rows of layers to merge, lowest first; ``points`` are internal snapshots to be made external.
    """

    def __init__(self, rows: tuple[tuple[LayerId, ...], ...] = (), points: tuple[Point, ...] = ()) -> None:
        super().__init__(f"{len(rows)} rows and {len(points)} points are not measured")
        self.rows = rows
        self.points = points
