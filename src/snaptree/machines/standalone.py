"""Standalone machines: QEMU by itself, the tree in snaptree's own state file."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from snaptree.errors import BusyError, NotFoundError, OutrunError, RefusedError, SnaptreeError, ToolError
from snaptree.images import durable
from snaptree.images.locks import MachineLock
from snaptree.machines.finding import find_disk
from snaptree.machines.findings import Finding
from snaptree.machines.free import require_free, require_plugged_in, without_others
from snaptree.machines.going import going
from snaptree.machines.memories import arrive, as_it_went, merge_loose, moving, with_memory
from snaptree.machines.options import DiskOption
from snaptree.machines.outrun import pull_instead
from snaptree.machines.power import LOOK_SECONDS, WORK_SECONDS, Power, monitor_of, silent
from snaptree.machines.survey import planned, read_survey
from snaptree.model.layer import LayerId
from snaptree.model.live import OFF
from snaptree.model.machine import MachineConfig
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning import verbs
from snaptree.planning.accept import AcceptRequest
from snaptree.planning.adopt import AttachRequest, DetachRequest
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.health import Ailment, ailments
from snaptree.planning.live import require_possible
from snaptree.planning.naming import renamed_roots
from snaptree.planning.plan import Plan
from snaptree.planning.settle import loose_layers
from snaptree.planning.verbs import RenameRequest, Request, SetRequest
from snaptree.running import loops
from snaptree.running.control import Control, recovering
from snaptree.running.journal import LogEntry, log
from snaptree.running.listening import heard
from snaptree.running.loops import LoopNeededError
from snaptree.running.pace import FREELY, Pace
from snaptree.running.progress import Report
from snaptree.running.progress import silent as unheard
from snaptree.store import operations, trees
from snaptree.store.database import Database

if TYPE_CHECKING:
    from snaptree.qemu.running import RunningQemu


@dataclass(frozen=True)
class View:
    """A machine as it is now: what is remembered and what was read.

    ``state`` is ``off``, ``running``, ``paused`` or ``unknown``.

    ``pending`` says in sentences what an interrupted operation or a waiting merge has left to do.
    """

    config: MachineConfig
    tree: Tree
    survey: Survey
    ailments: Mapping[LayerId, Ailment]
    pending: tuple[str, ...]
    state: str
    why: str = ""
    """What keeps snaptree from knowing more of its state, if anything."""


class Standalone:
    """One machine that was added. Making the object reads its configuration only."""

    def __init__(self, database: Database, name: str) -> None:
        self.database = database
        self.config = trees.load_config(database, name)

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.config.name

    def tree(self) -> Tree:
        """The tree as it is remembered; no image is read."""
        return trees.load_tree(self.database, self.name)

    def survey(self, tree: Tree, power: Power, folders: Iterable[str] = (), *, beside: bool = True) -> Survey:
        """Read the machine's files and what surrounds them."""
        return read_survey(self.database, self.config, tree, folders, beside=beside, power=power)

    def power(self, tree: Tree, request: Request | None = None) -> Power:
        """What the machine does now, and what a request needs to know of its memory."""
        if silent(self.database, self.config, tree):
            return Power(OFF)
        import asyncio

        async def ask() -> Power:
            async with self.asked(tree) as (power, qemu):
                return await with_memory(power, qemu, tree, request)

        return asyncio.run(ask())

    @asynccontextmanager
    async def asked(self, tree: Tree, seconds: float | None = None) -> AsyncIterator[tuple[Power, RunningQemu | None]]:
        """What the machine does, and its monitor if it runs and tells us."""
        if silent(self.database, self.config, tree):
            yield Power(OFF), None
            return
        if not loops.runs():
            raise LoopNeededError
        from snaptree.machines.asking import look

        power, qemu = await look(self.database, self.config, tree, seconds or LOOK_SECONDS)
        try:
            yield power, qemu
        finally:
            if qemu is not None:
                await qemu.close()

    def view(self, *, deep: bool = False) -> View:
        """The machine as it is now; takes no lock.

        :param deep: also look for overlays beside the layers.
        """
        tree = self.tree()
        power = self.power(tree)
        survey = self.survey(tree, power, beside=deep)
        found = ailments(tree, survey)
        return View(
            config=self.config,
            tree=tree,
            survey=survey,
            ailments=found,
            pending=self._pending(tree, survey),
            state=power.state,
            why=power.why,
        )

    def _pending(self, tree: Tree, survey: Survey) -> tuple[str, ...]:
        outsiders = frozenset(each.layer for each in survey.outsiders)
        waiting = [
            f"{tree.layers[number].path} waits to be merged ('snaptree gc {self.name}')"
            for number in sorted(loose_layers(tree, outsiders))
        ]
        waiting += [
            f"{root.path} gets the name {tree.roots[disk][0]} back when the machine has stopped"
            for disk, root in renamed_roots(tree).items()
        ]
        return (*self.unfinished(), *waiting)

    def unfinished(self) -> tuple[str, ...]:
        """A sentence for each operation that is under way or was killed."""
        return tuple(
            f"{each.summary}: under way, or interrupted ('snaptree recover {self.name}' finishes or undoes it)"
            for each in operations.unfinished(self.database, self.name)
        )

    # ---- planning and running -------------------------------------------------------------------------------------

    def plan(self, request: Request) -> Plan:
        """The plan for a request; takes no lock and touches nothing."""
        tree = self.tree()
        power = self.power(_expected(tree, request), request)
        moves = moving(self, request, power, tree)
        gone = going(self, request, power, tree) if moves is None else None
        plan = self.plan_with(tree, Power(OFF) if gone else power, request)
        return gone.told(plan) if gone else plan

    def plan_with(self, tree: Tree, power: Power, request: Request) -> Plan:
        """The plan for a request on a machine that is known to do this."""
        if not isinstance(request, RenameRequest | SetRequest):
            power.require_known(self.name)
            if power.live is not None:
                require_possible(self.name, request)
        survey = self.survey(tree, power, _folders(request))
        for folder in map(os.path.abspath, _folders(request)):
            if os.path.realpath(folder) != folder:
                hint = f"name the folder itself, {os.path.realpath(folder)}"
                raise RefusedError(f"{folder} is or leads through a symbolic link", hint)
        return planned(tree, survey, lambda measured: verbs.plan(tree, measured, request))

    def run(
        self,
        request: Request,
        *,
        wait: float = 0.0,
        pace: Pace = FREELY,
        progress: Report | None = None,
        confirm: Callable[[Plan], bool] | None = None,
        cancelled: threading.Event | None = None,
        control: Control | None = None,
    ) -> Plan:
        """Lock, recover, survey, plan, confirm, run.

        :param wait: for how many seconds to wait while another operation has the machine.
        :param pace: how fast data may move.
        :param confirm: is shown the plan; when it says no, nothing is touched.
        :param control: steers it from outside; it has ``pace`` and ``cancelled`` of its own.
        :raise BusyError: another operation has the machine, or another process one of its images.
        :raise CancelledError: it was stopped, or ``confirm`` said no.
        """
        steered = control or Control(self.name, pace=pace, cancelled=cancelled)

        def work() -> Coroutine[Any, Any, Plan]:
            return self.operate(request, wait=wait, progress=progress, confirm=confirm, control=steered)

        if not loops.runs():
            # Only what has nothing to do with a QEMU that runs can do without; nothing of it has begun.
            with suppress(LoopNeededError):
                return loops.without(work())
        import asyncio

        return asyncio.run(work())

    async def operate(
        self,
        request: Request,
        *,
        wait: float = 0.0,
        progress: Report | None = None,
        confirm: Callable[[Plan], bool] | None = None,
        control: Control,
    ) -> Plan:
        """As :meth:`run`, in an event loop that runs already."""
        from snaptree.errors import CancelledError
        from snaptree.running import executor
        from snaptree.running.holding import files_of

        with (
            durable.explained(f"a file of machine {self.name}", "use"),
            heard(self.database.folder, control),
            self.locked(wait, control.cancelled) as lock,
        ):
            await self.settle(lock, control)
            self.config = trees.load_config(self.database, self.name)
            tree = self.tree()
            lock.extend(_anchors(tree))
            async with self.asked(_expected(tree, request), WORK_SECONDS) as (power, qemu):
                power = await with_memory(power, qemu, tree, request)
                if isinstance(request, DetachRequest) and qemu is not None and request.target in tree.disks:
                    from snaptree.machines.asking import without_unplugged

                    tip = tree.active_branch.tips[request.target].layer
                    power = await without_unplugged(qemu, tree.chain(tip), _expected(tree, request))
                seen = _seen(tree, request)
                moves = moving(self, request, power, tree)
                if moves is not None and not loops.runs():
                    raise LoopNeededError
                gone = going(self, request, power, tree) if moves is None else None
                plan = self.plan_with(tree, Power(OFF) if gone else power, request)
                if isinstance(request, AttachRequest) and qemu is not None:
                    from snaptree.machines.asking import match

                    match(await qemu.graph(), plan.after, qemu.path)
                if confirm is not None and not confirm(plan):
                    raise CancelledError("nothing was done", "")
                if gone is not None and qemu is not None:
                    await gone.turn_off(qemu, tree)
                    # What was planned rested on disks that the guest wrote to.
                    power, qemu = Power(OFF), None
                    plan = gone.told(self.plan_with(tree, power, request))
                lock.extend(files_of(plan))
                moved = sorted(path for path, inode in _seen(tree, request).items() if inode != seen[path])
                if moved:
                    hint = "see what did it, and try again"
                    raise BusyError(f"{moved[0]} has been replaced since it was planned", hint)
                run = partial(
                    executor.run, self.database, self.name, lock=lock, report=progress or unheard, control=control
                )
                still = _still(tree, request) if power.live is None and moves is None else ()
                try:
                    outcome = await run(plan, qemu=qemu, still=still)
                except OutrunError as error:
                    outcome = await pull_instead(self, error, plan, request, partial(run, qemu=qemu), lock, qemu)
                except BaseException as error:
                    if isinstance(error, ToolError) and qemu is not None and not await qemu.answers():
                        # The guest may stand still, or its requests wait, until that has been brought to an end.
                        with suppress(SnaptreeError):
                            await self.settle(lock, control)
                    elif not operations.unfinished(self.database, self.name):
                        if gone is not None:
                            await gone.start(self, gone.before)
                        elif qemu is not None and isinstance(request, SnapshotRequest):
                            # Memory that could not be saved leaves overlays; what it leaves loose, gc merges.
                            with suppress(SnaptreeError):
                                await merge_loose(self, tree, qemu, lock)
                    raise
                if gone is not None:
                    await gone.start(self, gone.after)
                if moves is not None:
                    why = await arrive(self, moves, tree, outcome.qemu, lock)
                    outcome.said += [why] if why else []
                    if outcome.qemu is not None:
                        await outcome.qemu.close()
                return as_it_went(plan, outcome)

    async def settle(self, lock: MachineLock, control: Control | None = None) -> tuple[str, ...]:
        """Finish or undo what was killed, under the machine's lock."""
        if not operations.unfinished(self.database, self.name):
            return ()
        if not loops.runs():
            # A QEMU may have to be waited for: to load a memory once more, even where none runs.
            raise LoopNeededError
        from snaptree.running import recovery

        lock.extend(recovery.files_of(self.database, self.name))
        if silent(self.database, self.config, self.tree()):
            return await recovery.recover(self.database, self.name, lock, None, control)
        from snaptree.machines.asking import for_recovery

        qemu = await for_recovery(self.database, self.config, self.tree())
        try:
            return await recovery.recover(self.database, self.name, lock, qemu, control)
        finally:
            if qemu is not None:
                await qemu.close()

    @contextmanager
    def locked(self, wait: float, cancelled: threading.Event | None = None) -> Iterator[MachineLock]:
        """Have the machine to ourselves: no other snaptree works on it meanwhile."""
        lock = MachineLock()
        try:
            deadline = time.monotonic() + wait
            anchors: dict[str, tuple[int, int]] = {}
            # While it waited, the one before may have moved the machine to other files, removed these, or put others
            # in their place.
            while (now := _anchors(self.tree())) != anchors:
                with suppress(NotFoundError):
                    lock.acquire(now, max(0.0, deadline - time.monotonic()), cancelled)
                    anchors = now
            yield lock
        finally:
            lock.release()

    def recover(self, *, wait: float = 0.0) -> tuple[str, ...]:
        """Finish or undo what was killed; a sentence for each operation."""
        import asyncio

        if not operations.unfinished(self.database, self.name):
            return ()
        control = recovering(self.name)
        with heard(self.database.folder, control), self.locked(wait) as lock:
            return asyncio.run(self.settle(lock, control))

    # ---- looking --------------------------------------------------------------------------------------------------

    def attach_request(self, disk: DiskOption, bases: tuple[str, ...] = (), *, adopt: bool = False) -> AttachRequest:
        """Read a disk that is to be attached.

        :raise ExistsError: a machine owns it.
        :raise RefusedError: the machine runs, and has it not as a disk.
        """
        found = find_disk(disk, (*self.config.bases, *bases), adopt=adopt)
        found = without_others(self.database, found)
        monitor = monitor_of(self.database, self.config)
        require_free(self.database, found, adopt=adopt, monitor=monitor)
        if self.power(self.tree()).live is not None:
            require_plugged_in(self.name, found, monitor)
        return AttachRequest(found, adopt)

    def verify(self) -> tuple[Finding, ...]:
        """Check the files against the tree."""
        from snaptree.machines.verify import verify

        tree = self.tree()
        return verify(tree, self.survey(tree, self.power(tree)), self.unfinished())

    def log(self) -> tuple[LogEntry, ...]:
        """The machine's operations, oldest first."""
        return log(self.database, self.name)


def _anchors(tree: Tree) -> dict[str, tuple[int, int]]:
    """The images that stand for the machine, the owned roots and the active tips, and what is there (device, inode).

    Whoever works on the machine, from whatever state folder, locks these first.
    """
    found: set[str] = set()
    for point in tree.active_branch.tips.values():
        found.add(tree.layers[point.layer].path)
        root = tree.owned_root(point.layer)
        if root is not None:
            found.add(root.path)
    there: dict[str, tuple[int, int]] = {}
    for path in sorted(found):
        with suppress(OSError):
            status = os.stat(path)
            there[path] = (status.st_dev, status.st_ino)
    return there


def _expected(tree: Tree, request: Request) -> Tree:
    """The tree that a running machine is compared with. A disk that is to be let go may have been unplugged already."""
    if not isinstance(request, DetachRequest):
        return tree
    active = tree.active_branch
    tips = {disk: tip for disk, tip in active.tips.items() if disk != request.target}
    return tree.with_branches(replace(active, tips=tips))


def _folders(request: Request) -> list[str]:
    files: Mapping[str, str] = getattr(request, "files", {})
    memory: str | None = getattr(request, "memory_file", None)
    return [os.path.dirname(path) for path in (*files.values(), *([memory] if memory is not None else []))]


def _still(tree: Tree, request: Request) -> list[str]:
    """What nobody may begin to write to meanwhile: the active tips, where the machine has to be off, and a layer that
    is taken for what it is."""
    if isinstance(request, RenameRequest | SetRequest):
        return []
    tips = [tree.layers[tip.layer].path for tip in tree.branches[tree.active].tips.values()]
    return [*tips, request.path] if isinstance(request, AcceptRequest) else tips


def _seen(tree: Tree, request: Request) -> dict[str, tuple[int, int] | None]:
    """What is at each path that a plan rests on (device and inode): the layers, and the folders of new files."""
    folders = _folders(request)
    found: dict[str, tuple[int, int] | None] = {}
    for path in (*(layer.path for layer in tree.layers.values()), *folders):
        try:
            status = os.stat(path) if path in folders else os.lstat(path)
        except OSError:
            found[path] = None
        else:
            found[path] = (status.st_dev, status.st_ino)
    return found


def existing(path: str | None) -> str | None:
    """The path itself, without links, if something is there.

    :raise NotFoundError: nothing is.
    """
    if path is not None and not os.path.exists(path):
        raise NotFoundError(f"there is no {path}", "give the path of the machine's firmware state")
    return os.path.realpath(path) if path is not None else None
