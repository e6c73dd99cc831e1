"""Plans: what an operation will do and what it will cost, made without touching anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct, field

from snaptree.model.tree import Tree
from snaptree.planning.steps import BuildFromPoint, BuildMerged, Step


class Plan(Struct, frozen=True):
    """The ordered steps of one operation with what they will cost, made without touching anything.

    Steps before ``point_of_no_return`` (an index) are undone when the operation stops there, steps from it on are
    finished. ``then`` are the merges that follow, each an operation of its own: interruptible, resumable, never urgent.

    ``after`` is the tree that stands when the steps are done, ``end`` the one after ``then`` as well. All sizes are in
    bytes, ``seconds`` is an estimate. ``way`` is ``commit``, ``pull``, ``reflink``, several joined with ``+``, or
    ``None`` when no data moves. ``cancel`` is what Ctrl-C does: ``undoes`` or ``pauses``. ``guest_pause`` is how many
    seconds a guest stands still. ``estimate`` says that the machine runs, and its figures change while it does.
    """

    operation: str
    summary: str
    steps: tuple[Step, ...]
    point_of_no_return: int
    after: Tree
    bytes_to_copy: int = 0
    peak_extra_bytes: int = 0
    frees_bytes: int = 0
    seconds: float = 0.0
    guest_pause: float = 0.0
    way: str | None = None
    cancel: str = "undoes"
    paths_after: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    touches: tuple[str, ...] = ()
    then: tuple[Plan, ...] = ()
    estimate: bool = False

    @property
    def end(self) -> Tree:
        """The tree that stands when the steps and the merges that follow are done."""
        return self.then[-1].end if self.then else self.after

    def every(self) -> Iterator[Plan]:
        """This plan and those that follow, in order."""
        yield self
        for following in self.then:
            yield from following.every()

    @property
    def total_bytes(self) -> int:
        """What this plan and those that follow copy."""
        return sum(plan.bytes_to_copy for plan in self.every())

    @property
    def shared_bytes(self) -> int:
        """What this plan and those that follow need not copy, since files share blocks."""
        steps = (step for plan in self.every() for step in plan.steps)
        return sum(step.shared for step in steps if isinstance(step, BuildMerged | BuildFromPoint))

    def public(self) -> dict[str, Any]:
        """The form of ``--plan --json`` (DESIGN.md, "The command line"); changed only by adding."""
        plans = list(self.every())
        ways = sorted({way for plan in plans if plan.way for way in plan.way.split("+")})
        steps = [{"kind": step.kind, "summary": step.summary} for plan in plans for step in plan.steps]
        # Merges that follow one another don't need their room at the same time: what one frees the next can use.
        standing, peak = 0, 0
        for plan in plans:
            peak = max(peak, standing + plan.peak_extra_bytes)
            standing += -plan.frees_bytes
        return {
            "operation": self.operation,
            "summary": self.summary,
            "steps": steps,
            "way": "+".join(ways) or None,
            "bytes_to_copy": self.total_bytes,
            "bytes_to_share": self.shared_bytes,
            "peak_extra_bytes": peak,
            "frees_bytes": sum(plan.frees_bytes for plan in plans),
            "seconds": round(sum(plan.seconds for plan in plans), 3),
            "guest_pause": sum(plan.guest_pause for plan in plans),
            "cancel": "pauses" if any(plan.cancel == "pauses" for plan in plans) else "undoes",
            "paths_after": dict(plans[-1].paths_after),
            "point_of_no_return": self.point_of_no_return,
            "notes": [note for plan in plans for note in plan.notes],
            "estimate": any(plan.estimate for plan in plans),
        }
