"""How the time grows with the size of the delta, drawn by hand as SVG."""

from __future__ import annotations

from html import escape

from bench.figures import Results
from bench.rows import COMMIT, DD, EIGHT, FOUR, ONE, REBASE, SMALL, SNAPTREE, VIRSH

SIZES = ((SMALL, 0.25), (ONE, 1.0), (FOUR, 4.0), (EIGHT, 8.0))
WAYS = {SNAPTREE: "a", VIRSH: "b", REBASE: "c", COMMIT: "d", DD: "e"}
PANELS = (("xfs", "XFS: blocks can be shared"), ("ext4", "ext4: data has to be copied"))
WIDTH, HEIGHT, LEFT, TOP, ROOM, GAP, LINE = 330, 300, 52, 52, 165, 14, 15
STYLE = """
text { font: 12px sans-serif; fill: #333 } .head { font-weight: bold; font-size: 13px } .small { fill: #666 }
.grid { stroke: #ddd } path, line { fill: none; stroke-width: 1 } path { stroke-width: 2 }
.a { stroke: #0b7285 } .b { stroke: #c92a2a } .c { stroke: #e67700 } .d { stroke: #7048b8 }
.e { stroke: #868e96; stroke-dasharray: 4 3 } path.a { stroke-width: 3 }
text.a { fill: #0b7285; font-weight: bold } text.b { fill: #c92a2a } text.c { fill: #e67700 }
text.d { fill: #7048b8 } text.e { fill: #868e96 } text.a, text.b, text.c, text.d, text.e { stroke: none }
@media (prefers-color-scheme: dark) { text { fill: #ccc } .small { fill: #999 } .grid { stroke: #444 }
.a { stroke: #3bc9db } text.a { fill: #3bc9db } .b { stroke: #ff8787 } text.b { fill: #ff8787 }
.c { stroke: #ffc078 } text.c { fill: #ffc078 } .d { stroke: #b197fc } text.d { fill: #b197fc } }
"""


def complete(results: Results) -> bool:
    """Whether all points of the picture have been measured, at full size."""
    found = [results.get(system, what).median(SNAPTREE) for system, _ in PANELS for what, _ in SIZES]
    return results.divisor == 1 and None not in found


def draw(results: Results) -> str:
    """The picture."""
    across = LEFT + WIDTH + ROOM
    width, height = across * len(PANELS) + GAP, TOP + HEIGHT + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img" aria-label="Time to delete a snapshot against the size of its delta">',
        f"<style>{STYLE}</style>",
    ]
    for number, (system, title) in enumerate(PANELS):
        parts += _panel(results, system, title, number * across + LEFT)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(results: Results, system: str, title: str, left: int) -> list[str]:
    lines = {
        way: [(size, seconds) for what, size in SIZES if (seconds := results.get(system, what).median(way)) is not None]
        for way in WAYS
    }
    largest = max((seconds for points in lines.values() for _, seconds in points), default=1.0)
    step, most = _scale(largest)

    def x(size: float) -> float:
        return round(left + WIDTH * size / SIZES[-1][1], 1)

    def y(seconds: float) -> float:
        return round(TOP + HEIGHT * (1 - seconds / most), 1)

    parts = [
        f'<text class="head" x="{left}" y="{TOP - 30}">{escape(title)}</text>',
        f'<text class="small" x="{left}" y="{TOP - 12}">seconds, whole command, synced</text>',
        f'<text class="small" x="{left + WIDTH}" y="{TOP + HEIGHT + 36}" text-anchor="end">GiB deleted</text>',
    ]
    for number in range(round(most / step) + 1):
        value = number * step
        line = f'x1="{left}" x2="{left + WIDTH}" y1="{y(value)}" y2="{y(value)}"'
        parts.append(f'<line class="grid" {line}/>')
        parts.append(f'<text class="small" x="{left - 8}" y="{y(value) + 4:g}" text-anchor="end">{value:g}</text>')
    for _, size in SIZES:
        where = f'x="{x(size)}" y="{TOP + HEIGHT + 18}" text-anchor="middle"'
        parts.append(f'<text class="small" {where}>{size:g}</text>')
    ends = []
    for way, points in lines.items():
        if points:
            path = " L".join(f"{x(size)},{y(seconds)}" for size, seconds in points)
            parts.append(f'<path class="{WAYS[way]}" d="M{path}"/>')
            ends.append((y(points[-1][1]), way, points[-1][1]))
    for place, way, seconds in _apart(ends):
        text = f"{way}, {seconds:.2f} s"
        parts.append(f'<text class="{WAYS[way]}" x="{left + WIDTH + 8}" y="{place + 4:g}">{escape(text)}</text>')
    return parts


def _scale(largest: float) -> tuple[float, float]:
    """The distance of the grid's lines, and where it ends."""
    step = 0.001
    for factor in [2, 2.5, 2] * 8:
        if largest / step <= 6:
            break
        step *= factor
    return step, step * (int(largest / step) + 1)


def _apart(ends: list[tuple[float, str, float]]) -> list[tuple[float, str, float]]:
    """The labels at the lines' ends, from below, moved up where one would lie on the other."""
    placed: list[tuple[float, str, float]] = []
    above = float("inf")
    for place, way, seconds in sorted(ends, reverse=True):
        above = min(place, above - LINE)
        placed.append((above, way, seconds))
    return placed
