"""libvirt's domains: machines without being added.

The tree is read from libvirt's own records and the images' headers each time; no second truth is kept. What the state
file has of a domain is what it was like when snaptree last worked on it: ids of layers, and what frozen ones look like.

A verb puts the tree that was read into the state file, under the machine's lock, and is planned and carried out as for
a standalone machine. The journal's row is the commit point; a step of its own kind follows each change of the tree and
tells libvirt, repeatably. Meanwhile an operation that was killed is what the state file says, not libvirt's records.
Of a domain that runs libvirt has QEMU's monitor: what QEMU does, libvirt's own calls have it do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from msgspec import Struct
from msgspec.structs import replace

from snaptree.errors import BusyError, CancelledError, RefusedError, SnaptreeError
from snaptree.images import durable
from snaptree.images.locks import MachineLock
from snaptree.machines import domain_memories, due
from snaptree.machines.domain_reading import Reading, doubt, found_tree, live_of, other_domains_on, read
from snaptree.machines.findings import Finding
from snaptree.machines.going import Going, or_back
from snaptree.machines.kept import come_to_name, key_of
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
from snaptree.machines.memories import arrive, as_it_went
from snaptree.machines.power import Power
from snaptree.machines.survey import planned, read_survey
from snaptree.machines.transient import require_lasting
from snaptree.model.live import OFF, PAUSED
from snaptree.model.machine import LIBVIRT, MachineConfig
from snaptree.model.survey import Start, Survey
from snaptree.model.tree import Tree
from snaptree.planning import verbs
from snaptree.planning.accept import OwnRequest, all_owned
from snaptree.planning.adopt import AttachRequest, DetachRequest
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.domain_plan import for_domain, told
from snaptree.planning.domain_steps import WriteRecords
from snaptree.planning.health import ailments
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest, SwitchRequest, memory_moves
from snaptree.planning.sweep import follow
from snaptree.planning.verbs import RemoveRequest, RepairRequest, Request, SetRequest
from snaptree.running.control import Control
from snaptree.running.listening import heard
from snaptree.running.progress import Report
from snaptree.running.progress import silent as unheard
from snaptree.store import trees
from snaptree.store.database import Database
from snaptree.store.libvirt import applying
from snaptree.store.libvirt.calls import DomainHandle
from snaptree.store.libvirt.jobs import hint_for, jobs


class Looked(Struct, frozen=True):
    """A domain as it was just read, and its tree."""

    reading: Reading
    tree: Tree
    notes: tuple[str, ...] = ()


class LibvirtMachine(Machine):
    """One domain. Making the object asks libvirt nothing.

    :param name: by which it is known here: the domain's name, or its UUID where something else has the name.
    """

    def __init__(self, database: Database, handle: DomainHandle, name: str) -> None:
        self.database = database
        self.handle = handle
        self.config = MachineConfig(name, LIBVIRT, uri=handle.connection.uri, uuid=handle.uuid)

    @property
    def key(self) -> str:
        """Under which name the domain is kept: until it is worked on, one that it had."""
        assert self.config.uuid is not None
        return key_of(self.database, self.name, self.config.uuid)

    def look(self) -> Looked:
        """Read the domain and its tree."""
        reading = read(self.handle)
        self.config = replace(self.config, nvram=reading.domain.nvram)
        known = self._kept()
        if known is not None and self.unfinished():
            return Looked(reading, known)
        found = found_tree(reading, self.name, known)
        left = [f"disk {disk} is left alone: {why}" for disk, why in sorted(reading.domain.left.items())]
        if reading.domain.nvram_left:
            left.append(f"no snapshot keeps the UEFI variables: {reading.domain.nvram_left}")
        if reading.domain.tpm:
            left.append("what its TPM holds comes back with memory alone: no snapshot without keeps it")
        if unclear := doubt(reading):
            left.append(unclear[0])
        return Looked(reading, found.tree, (*found.notes, *left))

    def tree(self) -> Tree:
        """The tree as it is now."""
        # libvirt may be at what was killed, and answer nobody.
        known = self._kept() if self.unfinished() else None
        return known if known is not None else self.look().tree

    def _kept(self) -> Tree | None:
        """The tree that is in the state file, if it is this domain's."""
        key = self.key
        known = trees.find_config(self.database, key) is not None
        return replace(trees.load_tree(self.database, key), machine=self.name) if known else None

    def survey(self, looked: Looked, tree: Tree, folders: Iterable[str] = (), *, beside: bool = True) -> Survey:
        """Read the machine's files and what surrounds them."""
        power = Power(looked.reading.domain.state, live_of(looked.reading, tree))
        survey = read_survey(self.database, self.config, tree, folders, beside=beside, power=power)
        others = other_domains_on(self.handle, tree) if beside else ()
        # How it is started libvirt knows by itself.
        start = Start("", "/", "")
        return replace(survey, libvirt=True, start=start, outsiders=(*survey.outsiders, *others))

    def view(self, *, deep: bool = False) -> View:
        """The machine as it is now; takes no lock.

        :param deep: also look for overlays beside the layers, and for other domains on them.
        """
        looked = self.look()
        survey = self.survey(looked, looked.tree, beside=deep)
        return View(
            config=self.config,
            tree=looked.tree,
            survey=survey,
            ailments=ailments(looked.tree, survey),
            pending=self.pending(looked.tree, survey),
            state=looked.reading.domain.state,
            notes=looked.notes,
        )

    # ---- planning and running -------------------------------------------------------------------------------------

    def plan(self, request: Request) -> Plan:
        """The plan for a request; takes no lock and touches nothing."""
        looked = self.look()
        self._require_possible(looked, request)
        goes = self._going(looked, request)
        plan = self._plan(looked, looked.tree, request, off=goes is not None)
        return goes.told(plan) if goes is not None else plan

    def _plan(self, looked: Looked, tree: Tree, request: Request, *, off: bool) -> Plan:
        """The plan for a request.

        :param off: the domain is turned off for it, if it runs.
        """
        # Of what is to be owned it is read as well who else stands on it.
        read_as = all_owned(tree) if isinstance(request, OwnRequest) else tree
        survey = self.survey(looked, read_as, folders_of(request))
        survey = replace(survey, live=domain_memories.with_memory(self.handle, survey.live, tree, request))
        if off:
            survey = replace(survey, running=False, live=None)
        require_real_folders(request)
        plan = planned(tree, survey, lambda measured: verbs.plan(tree, measured, request))
        plan = for_domain(plan, request, tree, survey, self._tell(looked), looked.reading.domain)
        domain_memories.require_loadable(self.handle, plan)
        return plan

    def _tell(self, looked: Looked) -> WriteRecords:
        """The step that tells libvirt of a change of the tree that was just read."""
        assert self.config.uri is not None and self.config.uuid is not None
        known = tuple(sorted(each.name for each in looked.reading.records))
        tips = tuple((disk.target, disk.path) for disk in looked.reading.domain.disks)
        return WriteRecords(self.config.uri, self.config.uuid, known=known, tips=tips)

    def _require_possible(self, looked: Looked, request: Request) -> None:
        """See that the domain may be worked on so.

        :raise RefusedError: says what is in the way, and what to do.
        :raise BusyError: libvirt is at something with it.
        """
        domain = looked.reading.domain
        if isinstance(request, SetRequest | AttachRequest | DetachRequest):
            hint = f"use 'virsh attach-disk {domain.name}', 'virsh detach-disk' or 'virsh edit'"
            raise RefusedError(f"{domain.name} is a libvirt domain: its disks and settings are libvirt's", hint)
        if not domain.disks and not isinstance(request, RemoveRequest | RepairRequest):
            left = "; ".join(f"{disk} is left alone: {why}" for disk, why in sorted(domain.left.items()))
            raise RefusedError(f"domain {domain.name} has no disk that snaptree looks after", left)
        if found := jobs(self.handle):
            raise BusyError(f"libvirt is at work on domain {domain.name}: {found[0]}", hint_for(domain.name))
        if domain.saved:
            hint = f"start it, or drop what was saved with 'virsh managedsave-remove {domain.name}'"
            raise RefusedError(f"domain {domain.name} has a managed save, which would start it on its old disks", hint)
        require_lasting(domain, request)
        if unclear := doubt(looked.reading):
            raise RefusedError(f"domain {domain.name}: {unclear[0]}", unclear[1])
        if isinstance(request, SnapshotRequest) and request.internal and request.exclude:
            hint = "leave out --exclude, or take it external (without --internal)"
            raise RefusedError(f"libvirt has no record for an internal snapshot without {request.exclude[0]}", hint)
        if domain.state != OFF and isinstance(request, RemoveRequest):
            hint = f"shut it down first: 'virsh shutdown {domain.name}'"
            raise RefusedError(f"domain {domain.name} is {domain.state}, and has to be off for this", hint)

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
        from snaptree.running import executor
        from snaptree.running.holding import files_of

        self.database.open()
        with (
            durable.explained(f"a file of domain {self.name}", "use"),
            heard(self.database.folder, control),
            self.locked(wait, control.cancelled) as lock,
        ):
            await self.begin(request, lock, control)
            looked = self.look()
            self._require_possible(looked, request)
            tree = _begun(looked.tree)
            lock.extend(anchors(tree))
            before = seen(tree, request)
            goes = self._going(looked, request)
            moves = memory_moves(tree, looked.reading.domain.state, request)
            plan = self._plan(looked, tree, request, off=goes is not None)
            if confirm is not None and not confirm(plan):
                raise CancelledError("nothing was done", "")
            lock.extend(files_of(plan))
            require_same(tree, request, before)
            async with or_back(self.go_on, self.unfinished):
                self._keep(tree)
                if goes is not None:
                    due.note(self.database, self.name, goes.before, goes.after)
                elif moves is not None and moves.loads is None:
                    due.note(self.database, self.name, OFF, moves.after)
                if goes is not None and goes.before != OFF:
                    executor.require_free(plan, closing=self._opened())
                    self.handle.stop()
                    # What was planned rested on disks that the guest wrote to.
                    looked = self.look()
                    plan = self._plan(looked, tree, request, off=True)
                    lock.extend(files_of(plan))
                    require_same(tree, request, before)
                if goes is not None:
                    plan = goes.told(plan)
                if read(self.handle) != looked.reading:
                    hint = "see what did it, and try again"
                    raise BusyError(f"domain {self.name} has been changed since it was planned", hint)
                off = looked.reading.domain.state == OFF and moves is None
                try:
                    outcome = await executor.run(
                        self.database,
                        self.name,
                        plan,
                        lock=lock,
                        still=still(tree, request) if off else (),
                        spared=self._opened,
                        report=progress or unheard,
                        control=control,
                    )
                except BaseException:
                    if isinstance(request, SnapshotRequest) and request.memory and not self.unfinished():
                        # Memory that could not be saved may leave overlays; what it leaves loose, gc merges.
                        with suppress(SnaptreeError):
                            await self._merge_loose(tree, lock)
                    raise
            if moves is not None:
                outcome.said += await arrive(self.name, self._merge_loose(tree, lock))
            within = domain_memories.within(looked.tree, looked.reading, request)
            if goes is not None and goes.after != OFF and within is not None:
                due.define(self.database, self.name, self.handle.definition(secure=True))
                outcome.said += domain_memories.load_within(self.handle, within.name, goes.after)
            if goes is not None or moves is not None:
                due.arrived(self.database, self.name)
                await self.go_on()
        return as_it_went(plan, outcome)

    async def _merge_loose(self, before: Tree, lock: MachineLock) -> None:
        """Merge what an operation has made loose that could not be planned with it.

        :param before: the tree before that operation.
        """
        from snaptree.running import executor
        from snaptree.running.holding import files_of

        looked = self.look()
        survey = self.survey(looked, looked.tree)
        nothing = Plan("merge", "merge what is loose", (), 0, looked.tree)
        plan = planned(looked.tree, survey, lambda measured: follow(nothing, before, measured, "auto"))
        plan = told(plan, looked.tree, survey, self._tell(looked))
        lock.extend(files_of(plan))
        await executor.run(self.database, self.name, plan, lock=lock, spared=self._opened)

    def _going(self, looked: Looked, request: Request) -> Going | None:
        """What the domain does before and after a request to go elsewhere; ``None`` when it is off and stays so."""
        before = looked.reading.domain.state
        if not isinstance(request, RevertRequest | SwitchRequest) or memory_moves(looked.tree, before, request):
            return None
        within = domain_memories.within(looked.tree, looked.reading, request)
        after = request.power or (within.state if within is not None else before)
        return None if before == after == OFF else Going(before, after)

    async def go_on(self) -> bool:
        """Start the domain where it is off only for an operation that is over; whether that was to be done."""
        noted = due.noted(self.database, self.name)
        if noted is None:
            return False
        domain_memories.define_again(self.handle, noted.definition, self.tree)
        state = due.state(self.database, self.name)
        starts = state != OFF and not self._runs()
        if noted.before != OFF and starts:
            # One that has ended by itself had been started by somebody else.
            starts = not self.handle.has_ended_by_itself()
        if starts:
            with due.tried(self.database, self.name):
                self.handle.start(paused=state == PAUSED)
        due.forget(self.database, self.name)
        return starts

    def _keep(self, tree: Tree) -> None:
        """Put the tree that was read into the state file: steps change what is there."""
        kept = trees.find_config(self.database, self.name)
        config = self.config if kept is None else replace(self.config, created=kept.created, due=kept.due)
        with self.database.transaction() as connection:
            trees.register(connection, replace(config, created=config.created or time.time()), new=kept is None)
            trees.put_tree(connection, self.name, tree)

    def recover(self, *, wait: float = 0.0) -> tuple[str, ...]:
        """Finish or undo what was killed; a sentence for each operation."""
        from snaptree.store.libvirt.memory import DomainMemory

        noted = due.noted(self.database, self.name)
        if noted is not None and noted.definition is not None:
            # libvirt goes on loading memory when who has asked for it is gone, and answers nobody who asks for more
            # than half a minute.
            DomainMemory(self.handle).settle()
        return super().recover(wait=wait)

    async def settle(self, lock: MachineLock, control: Control | None = None) -> tuple[str, ...]:
        """Finish or undo what was killed, under the machine's lock."""
        said = await self.recover_as(self.key, lock, control) if self.unfinished() else ()
        return (*said, *await come_to_name(self, lock, control))

    async def recover_as(self, key: str, lock: MachineLock, control: Control | None) -> tuple[str, ...]:
        """Finish or undo what was killed, and is kept under a name."""
        from snaptree.running import recovery
        from snaptree.store.libvirt.memory import DomainMemory

        # What it was at libvirt goes on with by itself; who asks for something else meanwhile is told to come again.
        DomainMemory(self.handle).settle()
        lock.extend(recovery.files_of(self.database, key))
        return await recovery.recover(self.database, key, lock, None, control, self._opened())

    def _opened(self) -> frozenset[tuple[int, int]]:
        """The files (device and inode) that its QEMU has open, by what libvirt says."""
        found: set[tuple[int, int]] = set()
        for path in (path for chain in self.handle.chains().values() for path in chain) if self._runs() else ():
            with suppress(OSError):
                status = os.stat(path)
                found.add((status.st_dev, status.st_ino))
        return frozenset(found)

    def _runs(self) -> bool:
        return self.handle.state() != OFF

    # ---- looking --------------------------------------------------------------------------------------------------

    def _findings(self) -> tuple[Finding, ...]:
        from snaptree.machines.verify import verify

        looked = self.look()
        found = list(verify(looked.tree, self.survey(looked, looked.tree), self.unfinished()))
        hint = f"'snaptree verify {self.name} --repair' puts them right"
        unclear, what = doubt(looked.reading) or ("", "")
        if unclear:
            found.append(Finding("unclear", "", unclear, (), what, "warning"))
        elif not self.unfinished():
            for each in applying.difference(self.handle, looked.tree).sentences():
                severity = "note" if each == applying.NOTHING_YET else "warning"
                found.append(Finding("records", "", each, (), hint, severity))
        found += [Finding("note", "", each, (), "", "note") for each in looked.notes if each != unclear]
        return tuple(found)

    def snapshot_xml(self, name: str) -> str:
        """libvirt's own record of a snapshot.

        :raise NotFoundError: there is no such snapshot.
        """
        return self.handle.record(name)


def _begun(tree: Tree) -> Tree:
    """The tree whose active branch has a beginning, which libvirt asks of each record: that of a domain which snaptree
    has not worked on yet is not known."""
    active = tree.active_branch
    return tree if active.created else tree.with_branches(replace(active, created=time.time()))
