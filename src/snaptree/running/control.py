"""A verb that is being carried out, as it is seen and steered from outside: by Ctrl-C, a program, another terminal."""

from __future__ import annotations

import os
import pwd
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from snaptree.errors import RefusedError
from snaptree.images.mover.limiting import Limiter
from snaptree.model.sizes import readable
from snaptree.planning.domain_memory_steps import DomainGoOver
from snaptree.planning.live_steps import LiveMerge
from snaptree.planning.memory_steps import GoOver, SaveMemory
from snaptree.planning.plan import Plan
from snaptree.planning.steps import BuildFromPoint, BuildMerged, Move
from snaptree.running.pace import FREELY, Pace
from snaptree.running.progress import Progress

WAITING, RUNNING, PAUSING, PAUSED, STOPPING = "waiting", "running", "pausing", "paused", "stopping"
MOVES = (Move, LiveMerge, BuildMerged, BuildFromPoint)
"""The steps that take time, and that can be paused and slowed down."""
RATE_SECONDS = 10.0
"""The rate is that of so many seconds past."""
FIRST_SECONDS = 0.3
"""There is none before so many seconds have passed."""
FOLLOWING = 20
"""So many of the merges that follow are told by name."""


class Control:
    """What is known of the verb, and what is asked of it. Every method may be called by any thread.

    :param machine: the machine's name.
    :param operation: the verb.
    :param cancelled: set it, or call :meth:`cancel`, to stop.
    :param stoppable: whether it may be stopped; a recovery must come to its end.
    :param summary: what it is, until there is a plan.
    :param heard: is told in a sentence what has been asked from another terminal.
    """

    def __init__(
        self,
        machine: str,
        operation: str = "",
        *,
        pace: Pace = FREELY,
        cancelled: threading.Event | None = None,
        stoppable: bool = True,
        summary: str = "",
        heard: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.machine = machine
        self.operation = operation
        self.pace = pace
        self.cancelled = cancelled or threading.Event()
        self.limiter = Limiter(pace.limit)
        self.stoppable = stoppable
        self.summary = summary
        self.heard = heard
        self._lock = threading.Lock()
        self._since = time.time()
        self._plans: tuple[Plan, ...] = ()
        self._at = 0
        self._number: int | None = None
        self._progress: Progress | None = None
        self._samples: deque[tuple[float, int]] = deque()

    # ---- told by whoever carries it out ---------------------------------------------------------------------------

    def begin(self, plan: Plan) -> None:
        """It is its turn: the plan will be carried out, and those that follow it."""
        with self._lock:
            self._plans = tuple(plan.every())
            self.operation = self.operation or plan.operation

    def take(self, at: int, number: int) -> None:
        """One of the plans begins, under its number in the journal."""
        with self._lock:
            self._at, self._number, self._progress = at, number, None
            self._samples.clear()

    def report(self, progress: Progress) -> None:
        """How far it is."""
        now = time.monotonic()
        with self._lock:
            before, self._progress = self._progress, progress
            if before is None or (before.step, before.total) != (progress.step, progress.total):
                self._samples.clear()
            self._samples.append((now, progress.done))
            while len(self._samples) > 2 and self._samples[1][0] < now - RATE_SECONDS:
                self._samples.popleft()

    # ---- asked from outside ---------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop it as Ctrl-C does: it is undone, or a commit pauses until ``gc``.

        :raise RefusedError: it must come to its end.
        """
        if not self.stoppable:
            hint = "pause it, or slow it down: 'snaptree pause', 'snaptree limit'"
            raise RefusedError(f"the recovery of machine {self.machine} brings to its end what was killed", hint)
        self.cancelled.set()

    def pause(self) -> None:
        """Let no data move until :meth:`resume`.

        :raise RefusedError: there is nothing left to do that can be paused, or memory is being saved.
        """
        self._require_steerable("paused")
        if not self.pausable:
            what = "has not begun yet" if not self._plans else "moves no data (any more), and is over in a moment"
            raise RefusedError(f"the operation on machine {self.machine} {what}: it cannot be paused")
        self._change(held=True)

    def resume(self) -> None:
        """Let data move again."""
        self._change(held=False)

    def limit(self, speed: float) -> None:
        """Let so many bytes a second move from now on; 0 for no limit.

        :raise RefusedError: memory is being saved.
        """
        self._require_steerable("slowed down, or made faster")
        self._change(speed=speed)

    def _require_steerable(self, how: str) -> None:
        """Refuse while memory is being saved: QEMU (10.0.2) has no limit for that in the background, and no pause."""
        with self._lock:
            saves = self._saves()
        if saves:
            hint = f"it can be stopped: 'snaptree cancel {self.machine}'" if self.stoppable else ""
            raise RefusedError(f"memory that is being saved cannot be {how}", hint)

    def _saves(self) -> bool:
        """Whether the step that is being taken saves memory."""
        if self._progress is None or not self._plans:
            return False
        step = self._plans[self._at].steps[self._progress.step - 1]
        return isinstance(step, SaveMemory) or (isinstance(step, GoOver | DomainGoOver) and step.save is not None)

    def _change(self, *, held: bool | None = None, speed: float | None = None) -> None:
        """Change how fast it is: the rate of before says nothing any more."""
        with self._lock:
            self._samples.clear()
        if held is not None:
            self.limiter.held = held
        if speed is not None:
            self.limiter.speed = speed

    @property
    def state(self) -> str:
        """``waiting`` for its turn, ``running``, ``pausing``, ``paused`` or ``stopping``."""
        if self.cancelled.is_set():
            return STOPPING
        if not self._plans:
            return WAITING if self.stoppable and self._number is None else RUNNING
        if self.limiter.held:
            return PAUSED if self.limiter.resting else PAUSING
        return RUNNING

    @property
    def pausable(self) -> bool:
        """Whether something is left to do that can be paused, and can be now."""
        with self._lock:
            if self._saves():
                return False
            if not self._plans:
                return not self.stoppable or self._number is not None
            here, later = self._plans[self._at : self._at + 1], self._plans[self._at + 1 :]
            done = self._progress.step - 1 if self._progress is not None else 0
            steps = [*(step for plan in here for step in plan.steps[done:]), *(s for plan in later for s in plan.steps)]
        return any(isinstance(step, MOVES) for step in steps)

    def tell(self) -> dict[str, Any]:
        """Where it stands (``operations --json``); only added to. Sizes in bytes, times in seconds."""
        state, pausable = self.state, self.pausable
        with self._lock:
            plan = self._plans[self._at] if self._plans else None
            progress = self._progress
            rate = self._rate()
            done, total = (progress.done, progress.total) if progress is not None else (0, 0)
            left = (total - done) / rate if rate > 0 and state == RUNNING else None
            return {
                "machine": self.machine,
                "operation": plan.operation if plan is not None else self.operation,
                "summary": plan.summary if plan is not None else self.summary,
                "state": state,
                "id": self._number,
                "process": os.getpid(),
                "user": _user(os.geteuid()),
                "started": self._since,
                "step": progress.step if progress is not None else 0,
                "steps": progress.steps if progress is not None else 0,
                "doing": progress.summary if progress is not None else "",
                "bytes_moved": done,
                "bytes_total": total,
                "bytes_per_second": round(rate),
                "seconds_left": round(left, 1) if left is not None else None,
                "limit": round(self.limiter.speed) or None,
                "cancel": (plan.cancel if plan is not None else "undoes") if self.stoppable else None,
                "pausable": pausable,
                "then": [each.summary for each in self._plans[self._at + 1 :]][:FOLLOWING],
            }

    def _rate(self) -> float:
        """Bytes a second of late; 0 while nothing moves."""
        if len(self._samples) < 2:
            return 0.0
        (since, before), (_, done) = self._samples[0], self._samples[-1]
        seconds = time.monotonic() - since
        rate = max(0, done - before) / seconds if seconds > FIRST_SECONDS else 0.0
        # The first pieces are sent off at once.
        return min(rate, self.limiter.speed) if self.limiter.speed > 0 else rate


def recovering(machine: str) -> Control:
    """The control of a recovery: it may be paused and slowed down, and not be stopped."""
    return Control(machine, "recover", stoppable=False, summary="finish or undo what was killed")


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def answered(control: Control, ask: str, limit: float, who: str) -> None:
    """Do what another terminal asks for: ``cancel``, ``pause``, ``resume`` or ``limit``.

    :param who: who asks, for the sentence that the operation's own terminal shows.
    :raise RefusedError: it cannot be done.
    """
    sentence = ""
    match ask:
        case "cancel":
            control.cancel()
            sentence = f"stopping: {who} asks for it"
        case "pause":
            control.pause()
            sentence = f"paused by {who}; 'snaptree resume {control.machine}' goes on"
        case "resume":
            control.resume()
            sentence = f"resumed by {who}"
        case "limit":
            control.limit(limit)
            sentence = f"{who} has limited it to {readable(int(limit))}/s" if limit else f"{who} has lifted the limit"
    with suppress(OSError, ValueError):
        # Its terminal may be gone.
        control.heard(sentence)
