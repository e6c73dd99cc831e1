"""What is going on and what waits, and steering it from another process than the one that does it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from snaptree.errors import BusyError, NotFoundError, RefusedError
from snaptree.images.locks import worked_on
from snaptree.planning.settle import loose_layers
from snaptree.running import calling, recovery
from snaptree.running.calling import Heard
from snaptree.running.control import PAUSING, WAITING
from snaptree.store import operations, trees
from snaptree.store.database import Database
from snaptree.store.operations import Operation

INTERRUPTED, UNKNOWN, PENDING = "interrupted", "unknown", "pending"
PAUSE_SECONDS = 10.0
"""So long is waited until what moves data has come to rest."""
DEAF_SECONDS = 60.0
"""So long a process that is to stop may not answer at all before it is no longer waited for."""
_LOOK_SECONDS = 0.05


def operations_of(database: Database, machine: str | None = None) -> tuple[dict[str, Any], ...]:
    """What goes on and what waits, on one machine or on all: the form of ``operations --json``; only added to.

    ``state`` is ``running``, ``pausing``, ``paused``, ``stopping``, ``waiting`` (for another operation to end),
    ``interrupted`` (its process is gone: ``recover``), ``unknown`` (its process does not answer) or ``pending`` (a
    merge that waits for ``gc``).

    :raise NotFoundError: there is no machine of that name, nor anything going on under it.
    :raise StateError: the state folder cannot be used.
    """
    begun = [each for each in operations.unfinished(database) if machine in (None, each.machine)]
    heard = calling.everyone(database.folder)
    told = [each.told for each in heard if each.told and machine in (None, each.told["machine"])]
    deaf = [each.process for each in heard if not each.told]
    known = {each["id"] for each in told}
    # What has ended since it was read is no longer going on.
    left = {each.id for each in operations.unfinished(database)}
    silent = [_of_journal(database, each, deaf) for each in begun if each.id in left - known]
    names = trees.names(database)
    if machine is not None and machine not in names and not told and not silent:
        raise NotFoundError(f"there is no machine {machine!r}", "see 'snaptree list'")
    busy = {each["machine"] for each in (*told, *silent) if each["state"] != WAITING}
    idle = [name for name in names if machine in (None, name) and name not in busy]
    return (
        *sorted((*told, *silent), key=lambda each: (each["machine"], each["state"] == WAITING, each["started"])),
        *(each for name in idle for each in _pending(database, name)),
    )


def _record(machine: str, operation: str, summary: str, state: str, **more: Any) -> dict[str, Any]:
    """A record as ``Control.tell`` gives it, of what no process tells us."""
    empty: dict[str, Any] = {
        "machine": machine, "operation": operation, "summary": summary, "state": state, "id": None, "process": None,
        "user": None, "started": None, "step": 0, "steps": 0, "doing": "", "bytes_moved": 0, "bytes_total": 0,
        "bytes_per_second": 0, "seconds_left": None, "limit": None, "cancel": None, "pausable": False, "then": [],
    }  # fmt: skip
    return empty | more


def _of_journal(database: Database, each: Operation, deaf: list[int]) -> dict[str, Any]:
    """An operation that is in the journal and of which no process tells: killed, or somebody who does not answer."""
    steps = operations.steps_of(database, each.id)
    doing = steps[each.step].summary if 0 <= each.step < len(steps) else ""
    working = _is_worked_on(database, each)
    return _record(
        each.machine,
        each.operation,
        each.summary,
        UNKNOWN if working else INTERRUPTED,
        id=each.id,
        process=deaf[0] if working and len(deaf) == 1 else None,
        started=each.started,
        step=each.step + 1,
        steps=len(steps),
        doing=doing,
    )


def _is_worked_on(database: Database, each: Operation) -> bool:
    """Whether some snaptree has locked what the operation works on."""
    paths = set(recovery.files_of(database, each.machine))
    if each.machine in trees.names(database):
        tree = trees.load_tree(database, each.machine)
        paths |= {tree.layers[point.layer].path for point in tree.active_branch.tips.values()}
    return any(worked_on(path) for path in paths if os.path.exists(path))


def _pending(database: Database, machine: str) -> list[dict[str, Any]]:
    """The merges that wait for ``gc``."""
    tree = trees.load_tree(database, machine)
    owned = {layer.path: layer.id for layer in tree.layers.values() if layer.owned}
    outsiders = frozenset(owned[path] for _, path in trees.others_on(database, machine, tuple(owned)))
    return [
        _record(machine, "merge", f"merge {tree.layers[number].path}", PENDING)
        for number in sorted(loose_layers(tree, outsiders))
    ]


# ---- steering -----------------------------------------------------------------------------------------------------


def cancel(
    database: Database, machine: str, *, everything: bool = False, told: Callable[[str], None] = lambda sentence: None
) -> tuple[dict[str, Any], ...]:
    """Stop what runs on the machine as Ctrl-C does, and wait until it has; how each ended.

    What is cancelled is undone, or it is a commit and waits for ``gc``: the ``outcome`` is ``undone`` or ``paused``, or
    ``not begun``. Where nothing runs that waits for it, what waits is cancelled; with ``everything`` that as well.

    :param told: is told in a sentence what is waited for.
    :raise NotFoundError: nothing runs there.
    :raise RefusedError: it has come to its end, or must.
    :raise BusyError: its process does not answer.
    """
    found = _chosen(database, machine, everything=everything, waiting=True)
    asked = [each for each in found if calling.call(database.folder, each.name, "cancel") is not None]
    if not asked:
        raise _nothing(database, machine)
    ended = []
    for each in asked:
        told(f"stopping: {each.told['summary'] or each.told['operation']} (process {each.process})")
        ended.append(_outcome(database, _until_gone(database, each)))
    if late := [each for each in ended if each["outcome"] == operations.DONE]:
        raise RefusedError(f"{late[0]['summary']}: it was done before it could be stopped", "see 'snaptree log'")
    return tuple(ended)


def _until_gone(database: Database, last: Heard) -> Heard:
    """Wait until a process has ended its operation; what it told last.

    :raise BusyError: it does not answer.
    """
    heard = time.monotonic()
    while True:
        now = calling.call(database.folder, last.name)
        if now is None:
            return last
        if now.told:
            last, heard = now, time.monotonic()
        elif time.monotonic() - heard > DEAF_SECONDS:
            hint = "it stops as soon as it can; see 'snaptree operations'"
            raise BusyError(f"process {last.process} has been told to stop, and does not answer", hint)
        time.sleep(_LOOK_SECONDS)


def _outcome(database: Database, last: Heard) -> dict[str, Any]:
    number = last.told["id"]
    entry = operations.by_number(database, number) if number is not None else None
    outcome = entry.state if entry is not None else "not begun"
    if outcome == operations.DONE and last.told["then"]:
        # The names went; the merges that were to follow wait.
        outcome = operations.PAUSED
    elif outcome == operations.RUNNING:
        outcome = INTERRUPTED
    keys = ("machine", "operation", "summary", "id", "process")
    return {**{key: last.told[key] for key in keys}, "outcome": outcome}


def pause(database: Database, machine: str) -> tuple[dict[str, Any], ...]:
    """Let what runs on the machine move no data until it is resumed; what it tells then.

    Its ``state`` is ``paused``, or ``pausing`` while it is still at something that cannot be left in between.

    :raise NotFoundError: nothing runs there.
    :raise RefusedError: it cannot be paused.
    :raise BusyError: its process does not answer.
    """
    found = _ask(database, machine, "pause")
    until = time.monotonic() + PAUSE_SECONDS
    while any(each.told["state"] == PAUSING for each in found) and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
        now = [calling.call(database.folder, each.name) for each in found]
        found = [each for each in now if each is not None and each.told]
    if not found:
        raise NotFoundError(
            f"nothing runs on machine {machine} any more: it came to its end first", "see 'snaptree log'"
        )
    return tuple(each.told for each in found)


def resume(database: Database, machine: str) -> tuple[dict[str, Any], ...]:
    """Let what was paused on the machine go on; what it tells then. Errors as :func:`pause`."""
    return tuple(each.told for each in _ask(database, machine, "resume"))


def limit(database: Database, machine: str, speed: float) -> tuple[dict[str, Any], ...]:
    """Let what runs on the machine move so many bytes a second, from now on; what it tells then. Errors as above.

    :param speed: 0 for no limit.
    """
    return tuple(each.told for each in _ask(database, machine, "limit", speed))


def _ask(database: Database, machine: str, ask: str, speed: float = 0.0) -> list[Heard]:
    found = _chosen(database, machine, everything=False, waiting=False)
    answers = [calling.call(database.folder, each.name, ask, speed) for each in found]
    heard = [each for each in answers if each is not None]
    if not heard:
        raise _nothing(database, machine)
    if deaf := [each for each in heard if not each.told]:
        raise _deaf(machine, deaf[0].process)
    return heard


def _chosen(database: Database, machine: str, *, everything: bool, waiting: bool) -> list[Heard]:
    """The processes that are meant: those that work on the machine, or else, and with ``everything``, that wait for it.

    :raise NotFoundError: there is none.
    :raise BusyError: one does not answer, or does not listen.
    """
    heard = calling.everyone(database.folder)
    mine = [each for each in heard if each.told and each.told["machine"] == machine]
    working = [each for each in mine if each.told["state"] != WAITING]
    chosen = mine if everything else working or (mine if waiting else [])
    if chosen:
        return chosen
    if mine:
        hint = "see 'snaptree operations'; 'snaptree cancel' ends the waiting"
        raise NotFoundError(f"what there is on machine {machine} waits for another operation, and has not begun", hint)
    left = operations.unfinished(database, machine)
    if left and _is_worked_on(database, left[0]):
        raise _deaf(machine, next((each.process for each in heard if not each.told), 0))
    raise _nothing(database, machine)


def _deaf(machine: str, process: int) -> BusyError:
    who = f"process {process}, which works on machine {machine}," if process else f"whoever works on machine {machine}"
    return BusyError(f"{who} does not answer", "is it stopped (SIGSTOP)? Ctrl-C at its terminal stops the operation")


def _nothing(database: Database, machine: str) -> NotFoundError:
    if left := operations.unfinished(database, machine):
        return NotFoundError(
            f"nothing runs on machine {machine}: {left[0].summary} was interrupted, its process is gone",
            f"'snaptree recover {machine}' finishes or undoes it",
        )
    before = operations.history(database, machine)
    if machine not in trees.names(database) and not before:
        return NotFoundError(f"there is no machine {machine!r}", "see 'snaptree list'")
    last = f"; the last operation ({before[-1].summary}) is {before[-1].state}" if before else ""
    return NotFoundError(f"nothing runs on machine {machine}{last}", f"see 'snaptree operations {machine}'")
