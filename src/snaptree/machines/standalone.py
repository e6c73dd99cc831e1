"""Standalone machines: QEMU by itself, the tree in snaptree's own state file."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from msgspec.structs import replace

from snaptree.errors import NotFoundError, OutrunError, RefusedError, SnaptreeError, ToolError
from snaptree.images import durable
from snaptree.images.locks import MachineLock
from snaptree.machines import due
from snaptree.machines.finding import find_disk
from snaptree.machines.findings import Finding
from snaptree.machines.free import require_free, require_plugged_in, without_others
from snaptree.machines.going import going, or_back
from snaptree.machines.machine import (
    Machine,
    View,
    anchors,
    folders_of,
    require_real_folders,
    require_same,
    seen,
    still,
)
from snaptree.machines.memories import arrive, as_it_went, merge_loose, moving, with_memory
from snaptree.machines.options import DiskOption
from snaptree.machines.outrun import pull_instead
from snaptree.machines.power import LOOK_SECONDS, WORK_SECONDS, Power, monitor_of, silent
from snaptree.machines.survey import planned, read_survey
from snaptree.model.live import OFF, PAUSED
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning import verbs
from snaptree.planning.adopt import AttachRequest, DetachRequest
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.health import ailments
from snaptree.planning.live import require_possible
from snaptree.planning.plan import Plan
from snaptree.planning.verbs import RenameRequest, RepairRequest, Request, SetRequest
from snaptree.running import loops
from snaptree.running.control import Control
from snaptree.running.listening import heard
from snaptree.running.loops import LoopNeededError, within
from snaptree.running.progress import Report
from snaptree.running.progress import silent as unheard
from snaptree.store import operations, trees
from snaptree.store.database import Database

if TYPE_CHECKING:
    from snaptree.qemu.running import RunningQemu


class Standalone(Machine):
    """One machine that was added. Making the object reads its configuration only."""

    def __init__(self, database: Database, name: str) -> None:
        self.database = database
        self.config = trees.load_config(database, name)

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
            pending=self.pending(tree, survey),
            state=power.state,
            why=power.why,
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
        if isinstance(request, RepairRequest):
            hint = f"see what is wrong with 'snaptree verify {self.name}'"
            raise RefusedError(f"machine {self.name} is none of libvirt's, whose records could be put right", hint)
        if not isinstance(request, RenameRequest | SetRequest):
            power.require_known(self.name)
            if power.live is not None:
                require_possible(self.name, request)
        survey = self.survey(tree, power, folders_of(request))
        require_real_folders(request)
        return planned(tree, survey, lambda measured: verbs.plan(tree, measured, request))

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
            if isinstance(request, SetRequest) and request.config.keys != self.config.keys:
                self._know(request.config.keys)
            await self.begin(request, lock, control)
            self.config = trees.load_config(self.database, self.name)
            tree = self.tree()
            lock.extend(anchors(tree))
            async with self.asked(_expected(tree, request), WORK_SECONDS) as (power, qemu):
                power = await with_memory(power, qemu, tree, request)
                if isinstance(request, DetachRequest) and qemu is not None and request.target in tree.disks:
                    from snaptree.machines.asking import without_unplugged

                    tip = tree.active_branch.tips[request.target].layer
                    power = await without_unplugged(qemu, tree.chain(tip), _expected(tree, request))
                before = seen(tree, request)
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
                lock.extend(files_of(plan))
                require_same(tree, request, before)
                run = partial(
                    executor.run, self.database, self.name, lock=lock, report=progress or unheard, control=control
                )
                async with or_back(self.go_on, partial(operations.unfinished, self.database, self.name)):
                    if gone is not None:
                        gone.note(self)
                    elif moves is not None and moves.loads is None:
                        due.note(self.database, self.name, OFF, moves.after)
                    if gone is not None and qemu is not None:
                        executor.require_free(plan, closing=await qemu.open_files(), keys=self.config.keys)
                        await gone.turn_off(qemu, tree)
                        # What was planned rested on disks that the guest wrote to.
                        power, qemu = Power(OFF), None
                        plan = gone.told(self.plan_with(tree, power, request))
                        lock.extend(files_of(plan))
                        require_same(tree, request, before)
                    held = still(tree, request) if power.live is None and moves is None else ()
                    try:
                        outcome = await run(plan, qemu=qemu, still=held)
                    except OutrunError as error:
                        outcome = await pull_instead(self, error, plan, request, partial(run, qemu=qemu), qemu)
                    except BaseException as error:
                        if qemu is not None:
                            await self._failed(error, request, tree, qemu, lock, control)
                        raise
                if moves is not None:
                    outcome.said += await arrive(self.name, merge_loose(self, tree, outcome.qemu, lock))
                    if outcome.qemu is not None:
                        await outcome.qemu.close()
                if gone is not None or moves is not None:
                    due.arrived(self.database, self.name)
                    await self.go_on()
                return as_it_went(plan, outcome)

    def _know(self, keys: Mapping[str, str]) -> None:
        """Remember these keys at once: what was killed may take one of them to be undone."""
        with self.database.transaction() as connection:
            config = replace(trees.load_config(self.database, self.name), keys=keys)
            trees.register(connection, config, new=False)

    async def go_on(self) -> bool:
        """Start the machine where it is off only for an operation that is over; whether that was to be done."""
        state = due.state(self.database, self.name)
        power = await within(self._put_on(state)) if state != OFF else Power(OFF)
        if power.state == OFF or power.live is not None:
            due.forget(self.database, self.name)
        return power.state == OFF != state

    async def _put_on(self, state: str) -> Power:
        """Start the machine if it is off; what it did before."""
        async with self.asked(self.tree()) as (power, _):
            pass
        if power.state == OFF:
            from snaptree.machines import switching

            with due.tried(self.database, self.name):
                await switching.launch(self, self.tree(), paused=state == PAUSED)
        return power

    async def _failed(
        self, error: BaseException, request: Request, tree: Tree, qemu: RunningQemu, lock: MachineLock, control: Control
    ) -> None:
        """What is done at once after something has failed on a machine that runs."""
        if isinstance(error, ToolError) and not await qemu.answers():
            # The guest may stand still, or its requests wait, until that has been brought to an end.
            with suppress(SnaptreeError):
                await self.settle(lock, control)
        elif isinstance(request, SnapshotRequest) and not operations.unfinished(self.database, self.name):
            # Memory that could not be saved leaves overlays; what it leaves loose, gc merges.
            with suppress(SnaptreeError):
                await merge_loose(self, tree, qemu, lock)

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

    def keys_with(self, files: Iterable[str]) -> Mapping[str, str]:
        """The keys of the machine's encrypted layers, with those in these files: see ``keys.with_keys``."""
        from snaptree.machines.keys import with_keys

        layers = (layer.path for layer in self.tree().layers.values() if layer.format == "qcow2")
        return with_keys(self.config.keys, files, layers)

    def _findings(self) -> tuple[Finding, ...]:
        from snaptree.machines.verify import verify

        tree = self.tree()
        return verify(tree, self.survey(tree, self.power(tree)), self.unfinished(), self.config.keys)

    def snapshot_xml(self, name: str) -> str:
        """One snapshot as libvirt's domainsnapshot XML.

        :raise NotFoundError: there is no such snapshot.
        """
        from snaptree.machines.libvirt_xml import snapshot_xml

        return snapshot_xml(self.view(), name)


def _expected(tree: Tree, request: Request) -> Tree:
    """The tree that a running machine is compared with. A disk that is to be let go may have been unplugged already."""
    if not isinstance(request, DetachRequest):
        return tree
    active = tree.active_branch
    tips = {disk: tip for disk, tip in active.tips.items() if disk != request.target}
    return tree.with_branches(replace(active, tips=tips))


def existing(path: str | None) -> str | None:
    """The path itself, without links, if something is there.

    :raise NotFoundError: nothing is.
    """
    if path is not None and not os.path.exists(path):
        raise NotFoundError(f"there is no {path}", "give the path of the machine's firmware state")
    return os.path.realpath(path) if path is not None else None
