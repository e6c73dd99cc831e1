"""What the user sees: sizes, plans, progress, and what an operation did."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from snaptree.model.names import visible
from snaptree.model.sizes import readable as size

if TYPE_CHECKING:
    from snaptree.machines.machine import Machine
    from snaptree.planning.plan import Plan
    from snaptree.planning.verbs import Request
    from snaptree.running.pace import Pace
    from snaptree.running.progress import Progress, Report


def say(text: str, *, err: bool = False) -> None:
    """Print a text for people; whatever it quotes, a terminal only shows it."""
    click.echo(visible(text), err=err)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2))


def cost(plan: Plan) -> str:
    """What a plan costs, in a line."""
    public = plan.public()
    parts = []
    if public["bytes_to_copy"]:
        parts.append(
            f"copies {size(public['bytes_to_copy'])}{_by(public)}, in about {max(0.1, public['seconds']):.1f} s"
        )
    if public["bytes_to_share"]:
        parts.append(f"shares {size(public['bytes_to_share'])} instead of copying it")
    if public["peak_extra_bytes"]:
        parts.append(f"needs up to {size(public['peak_extra_bytes'])} of room meanwhile")
    if public["frees_bytes"] > 0:
        parts.append(f"frees {size(public['frees_bytes'])}")
    return "; ".join(parts) or "costs next to nothing"


def _by(public: dict[str, Any]) -> str:
    """The way in which data is merged; nothing where what is copied is something else, as memory."""
    return f" by {public['way']}" if public["way"] else ""


def print_plan(plan: Plan, *, as_json: bool) -> None:
    """Print a plan that is not carried out."""
    if as_json:
        print_json(plan.public())
        return
    say(f"{plan.summary}:")
    number = 0
    for each in plan.every():
        if each is not plan and each.steps:
            say(f"  then {each.summary}:")
        for place, step in enumerate(each.steps):
            number += 1
            if place == each.point_of_no_return and place:
                say("     -- point of no return --")
            say(f"  {number:2d}. {step.summary}")
    if not number:
        say("  nothing to do")
    say(f"  {cost(plan)}")
    public = plan.public()
    if public["bytes_to_copy"] or public["bytes_to_share"]:
        say(f"  Ctrl-C {public['cancel']} it")
    for disk, path in public["paths_after"].items():
        say(f"  afterwards {disk} is {path}")
    for note in public["notes"]:
        say(f"  note: {note}")


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that the operation ends in order."""
    event = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if not event.is_set():
            say("\nstopping ...", err=True)
        event.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(*, wanted: bool) -> Iterator[Report]:
    """A progress bar on a terminal, once data moves; nothing elsewhere."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(progress: Progress) -> None:
            if progress.total <= 0:
                return
            key = f"{progress.operation} {progress.step}"
            if progress.done and key not in tasks:
                tasks[key] = bar.add_task(progress.operation, total=progress.total)
            if key in tasks:
                bar.update(tasks[key], completed=progress.done, total=progress.total)

        yield report


def carry_out(
    machine: Machine, request: Request, *, only_plan: bool, as_json: bool, wait: float, pace: Pace | None = None
) -> None:
    """Plan a request and carry it out, or only print the plan; then say what was done."""
    from snaptree.running.control import Control
    from snaptree.running.pace import Pace

    if only_plan:
        print_plan(machine.plan(request), as_json=as_json)
        return

    planned: list[Plan] = []

    def confirm(plan: Plan) -> bool:
        planned.append(plan)
        return True

    with stoppable() as stop, progress_bar(wanted=not as_json) as bar:

        def report(progress: Progress) -> None:
            # The first report comes when nothing has refused the operation: only then is there something to announce.
            if planned and (planned[0].total_bytes or planned[0].shared_bytes) and not as_json:
                ends = planned[0].public()["cancel"]
                say(f"{planned[0].summary}: {cost(planned[0])} (Ctrl-C {ends})", err=True)
            planned.clear()
            bar(progress)

        def heard(sentence: str) -> None:
            say(f"\n{sentence}", err=True)

        control = Control(machine.name, pace=pace or Pace(), cancelled=stop, heard=heard)
        plan = machine.run(request, wait=wait, progress=report, confirm=confirm, control=control)
    done(plan, as_json=as_json)


def done(plan: Plan, *, as_json: bool) -> None:
    """Say what was done."""
    public = plan.public()
    if as_json:
        print_json(public)
        return
    copied = public["bytes_to_copy"] or (public["way"] and not public["bytes_to_share"])
    # How much memory the guest has filled is known to it alone, and the plan says what it can be at the most.
    at_most = "" if public["way"] else "at most "
    parts = [f"copied {at_most}{size(public['bytes_to_copy'])}{_by(public)}"] if copied else []
    parts += [f"shared {size(public['bytes_to_share'])}"] if public["bytes_to_share"] else []
    parts += [f"freed {size(public['frees_bytes'])}"] if public["frees_bytes"] > 0 else []
    say(f"{plan.summary}: done" + (f" ({', '.join(parts)})" if parts else ""))
    # Where a tip is afterwards is news when a new file was made for it, or a merge has moved it.
    new = plan.operation in ("snapshot", "revert", "switch", "add", "attach")
    moved = {disk: path for disk, path in public["paths_after"].items() if new or plan.paths_after.get(disk) != path}
    for disk, path in moved.items():
        say(f"  {disk} is {path}")
    for note in public["notes"]:
        say(f"  note: {note}")
