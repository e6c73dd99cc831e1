"""What was measured: kept as JSON, told as a table, held against the targets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.rows import (
    BARE,
    COMMIT,
    DD,
    DOMAIN,
    DOMAIN_EIGHT,
    DOMAIN_OFF,
    EIGHT,
    FINE,
    FOUR,
    LITTLE_MEMORY,
    MIB,
    MUCH_MEMORY,
    ONE,
    OURS,
    REBASE_NONE,
    ROWS,
    RUNNING,
    RUNNING_EIGHT,
    SAME_EXTENTS,
    SMALL,
    SNAPTREE,
    THEIRS,
    VIRSH,
)


@dataclass
class Space:
    """What a run of snaptree did to the file system: the growth, and the metadata that it may have grown by."""

    grown: int
    metadata: int


@dataclass
class Stall:
    """The longest that the guest waited for its disk, in seconds: with nothing going on, and during the deletion.

    While a snapshot with memory is taken, which stops its clock: the longest that nothing was heard from it.
    """

    idle: float
    during: float


@dataclass
class Figures:
    """The times of one row in seconds, by way, and what was left out, by way, with the reason."""

    times: dict[str, list[float]] = field(default_factory=dict)
    space: list[Space] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    stalls: dict[str, list[Stall]] = field(default_factory=dict)

    def median(self, way: str) -> float | None:
        """The median of a way's times."""
        times = self.times.get(way)
        return statistics.median(times) if times else None

    def stall(self, way: str) -> Stall | None:
        """The medians of the guest's longest waits."""
        found = self.stalls.get(way)
        if not found:
            return None
        return Stall(statistics.median(each.idle for each in found), statistics.median(each.during for each in found))

    def beyond_start(self, way: str = SNAPTREE) -> float | None:
        """The median without the start of a bare Python with the same imports; at least 10 ms, which is noise."""
        whole, bare = self.median(way), self.median(BARE)
        return None if whole is None or bare is None else max(0.01, whole - bare)


@dataclass
class Results:
    """All rows that have been measured, and what on."""

    divisor: int
    host: dict[str, str]
    rows: dict[str, Figures] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Keep them."""
        rows = {name: {**asdict(figures), "medians": _medians(figures)} for name, figures in self.rows.items()}
        path.write_text(json.dumps({"divisor": self.divisor, "host": self.host, "rows": rows}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """What :meth:`save` has kept."""
        kept = json.loads(path.read_text())
        rows = {
            name: Figures(
                row["times"],
                [Space(**each) for each in row["space"]],
                row["left_out"],
                {way: [Stall(**each) for each in stalls] for way, stalls in row.get("stalls", {}).items()},
            )
            for name, row in kept["rows"].items()
        }
        return cls(kept["divisor"], kept["host"], rows)

    def get(self, system: str, what: str) -> Figures:
        """One row; an empty one where it was not measured."""
        return self.rows.get(f"{system}: {what}", Figures())


def _medians(figures: Figures) -> dict[str, float]:
    return {way: statistics.median(times) for way, times in figures.times.items() if times}


def table(results: Results) -> str:
    """The table, in Markdown: medians in seconds, and how many times as long as ``snaptree`` the others take."""
    head = ["file system", "what", *OURS, "its start", "beyond it", *THEIRS, "room"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, figures in results.rows.items():
        system, _, what = name.partition(": ")
        whole = figures.median(SNAPTREE)
        cells = [system, what, *(_seconds(figures.median(way)) for way in OURS)]
        cells += [_seconds(figures.median(BARE)), _seconds(figures.beyond_start())]
        for way in THEIRS:
            theirs = figures.median(way)
            cells.append(_seconds(theirs) if not theirs or not whole else f"{theirs:.3f} ({theirs / whole:.1f}x)")
        cells.append(_room(figures))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _room(figures: Figures) -> str:
    if not figures.space:
        return ""
    return f"{statistics.median(each.grown for each in figures.space) / MIB:+.1f} MiB"


@dataclass(frozen=True)
class Target:
    """One figure that is aimed at; ``value`` is None where it was not measured."""

    what: str
    value: float | None
    bound: float
    least: bool

    @property
    def reached(self) -> bool | None:
        """Whether it was reached."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.least else "<="
        if self.value is None:
            return f"not measured  {self.what}: {sign} {self.bound:g}"
        word = "reached" if self.reached else "NOT REACHED"
        return f"{word:12}  {self.what}: {self.value:.2f} ({sign} {self.bound:g})"


def targets(results: Results) -> list[Target]:
    """Every target, with what was measured."""
    return [*_sharing(results), *_copying(results), *_running(results), *_domains(results), *_memory(results)]


def _sharing(results: Results) -> Iterator[Target]:
    for system in ("xfs", "btrfs"):
        one = results.get(system, ONE)
        for rival, whole, beyond in ((COMMIT, 3, 10), (VIRSH, 10, 40)):
            theirs = one.median(rival)
            yield Target(f"{system}, {ONE}: {rival} / snaptree", _ratio(theirs, one.median(SNAPTREE)), whole, True)
            yield Target(
                f"{system}, {ONE}: {rival} / snaptree without Python's start",
                _ratio(theirs, one.beyond_start()),
                beyond,
                True,
            )
        many = results.get(system, SAME_EXTENTS)
        ours = many.median(SNAPTREE)
        yield Target(f"{system}, {SAME_EXTENTS} / {ONE}: snaptree", _ratio(ours, one.median(SNAPTREE)), 1.3, False)
        yield Target(f"{system}, {SAME_EXTENTS}: {COMMIT} / snaptree", _ratio(many.median(COMMIT), ours), 15, True)
        for what, figures in ((ONE, one), (SAME_EXTENTS, many)):
            over = [max(0, each.grown - each.metadata) / MIB for each in figures.space]
            largest = max(over) if over else None
            yield Target(f"{system}, {what}: MiB of room taken beyond the metadata", largest, 0, False)


def _copying(results: Results) -> Iterator[Target]:
    system = "ext4"
    small = results.get(system, SMALL)
    yield Target(
        f"{system}, {SMALL}: {COMMIT} / snaptree without Python's start",
        _ratio(small.median(COMMIT), small.beyond_start()),
        1,
        True,
    )
    for row in ROWS:
        if row.system != system or row.what == SMALL or row.running or row.domain:
            continue
        figures = results.get(system, row.what)
        ours = figures.median(SNAPTREE)
        yield Target(f"{system}, {row.what}: {COMMIT} / snaptree", _ratio(figures.median(COMMIT), ours), 1, True)
        yield Target(f"{system}, {row.what}: {VIRSH} / snaptree", _ratio(figures.median(VIRSH), ours), 3, True)
    for what in (ONE, FOUR, EIGHT):
        figures = results.get(system, what)
        yield Target(
            f"{system}, {what}: snaptree without Python's start / {DD}",
            _ratio(figures.beyond_start(), figures.median(DD)),
            1.5,
            False,
        )
    fine = results.get(system, FINE)
    theirs = fine.median(REBASE_NONE)
    yield Target(f"{system}, {FINE}: {REBASE_NONE} / snaptree", _ratio(theirs, fine.median(SNAPTREE)), 3, True)


def _running(results: Results) -> Iterator[Target]:
    for system, what, bound in (("xfs", RUNNING, 2), ("xfs", RUNNING_EIGHT, 10), ("ext4", RUNNING, 1)):
        figures = results.get(system, what)
        theirs, name = figures.median(VIRSH), f"{system}, {what}: {VIRSH} / snaptree"
        yield Target(name, _ratio(theirs, figures.median(SNAPTREE)), bound, True)
        if (system, what) == ("xfs", RUNNING):
            yield Target(f"{name} without Python's start", _ratio(theirs, figures.beyond_start()), 5, True)
        wait, rival = figures.stall(SNAPTREE), figures.stall(VIRSH)
        if system == "xfs":
            added = (wait.during - wait.idle) * 1000 if wait else None
            yield Target(f"{system}, {what}: ms that the guest waits longer than otherwise", added, 50, False)
        compared = _ratio(wait.during, rival.during) if wait and rival else None
        yield Target(f"{system}, {what}: the guest's longest wait, snaptree / {VIRSH}", compared, 1, False)


def _domains(results: Results) -> Iterator[Target]:
    """On the very domain that virsh works on; whole commands."""
    for system, what, bound in (
        ("xfs", DOMAIN_OFF, 8),
        ("ext4", DOMAIN_OFF, 3),
        ("xfs", DOMAIN, 1.5),
        ("xfs", DOMAIN_EIGHT, 8),
        ("ext4", DOMAIN, 1),
    ):
        figures = results.get(system, what)
        ratio = _ratio(figures.median(VIRSH), figures.median(SNAPTREE))
        yield Target(f"{system}, {what}: {VIRSH} / snaptree", ratio, bound, True)


def _memory(results: Results) -> Iterator[Target]:
    little, much = (results.get("xfs", what) for what in (LITTLE_MEMORY, MUCH_MEMORY))
    ours, theirs, less = much.stall(SNAPTREE), much.stall(VIRSH), little.stall(SNAPTREE)
    grows = _ratio(ours.during, less.during) if ours and less else None
    yield Target(f"xfs, {MUCH_MEMORY} / {LITTLE_MEMORY}: the guest's pause", grows, 2, False)
    compared = _ratio(theirs.during, ours.during) if ours and theirs else None
    yield Target(f"xfs, {MUCH_MEMORY}: the guest's pause, {VIRSH} / snaptree", compared, 10, True)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def report(results: Results) -> str:
    """All that is printed at the end."""
    parts = [table(results), ""]
    parts += [
        f"left out in {name}: {way}: {why}" for name, row in results.rows.items() for way, why in row.left_out.items()
    ]
    for name, row in results.rows.items():
        for way in row.stalls:
            wait = row.stall(way)
            assert wait is not None
            figures = f"{wait.during * 1000:.1f} ms, with nothing going on {wait.idle * 1000:.1f} ms"
            parts.append(f"the guest's longest wait in {name}, {way}: {figures}")
    if results.divisor != 1:
        parts.append(f"sizes divided by {results.divisor}: a try, the figures say nothing")
    fewest = min((len(times) for row in results.rows.values() for times in row.times.values()), default=0)
    host = ", ".join(f"{key} {value}" for key, value in results.host.items())
    parts += [f"Medians of at least {fewest} runs, in seconds. {host}.", ""]
    found: Sequence[Target] = targets(results)
    return "\n".join([*parts, *map(str, found)])
