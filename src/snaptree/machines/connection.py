"""The door to all machines: those of a state folder, and the domains of libvirt."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from snaptree.errors import BusyError, ExistsError, NotFoundError, RefusedError, SnaptreeError
from snaptree.images.locks import MachineLock
from snaptree.machines.finding import find_disk
from snaptree.machines.free import require_free, without_others
from snaptree.machines.machine import Machine
from snaptree.machines.options import AddOptions
from snaptree.machines.standalone import Standalone, existing
from snaptree.machines.survey import read_survey
from snaptree.model.machine import STANDALONE, MachineConfig
from snaptree.planning.adopt import AddRequest, FoundSnapshot, add, empty
from snaptree.planning.launch import checked_command
from snaptree.planning.plan import Plan
from snaptree.running.control import Control, recovering
from snaptree.running.listening import heard
from snaptree.store import operations, trees
from snaptree.store.database import Database, default_state


class Connection:
    """The machines of one state folder (``$SNAPTREE_STATE`` or the default), and libvirt's domains.

    Making the object reads nothing.

    :param uri: the connection to libvirt; without it ``LIBVIRT_DEFAULT_URI``, or a daemon of the system's that runs.
    """

    def __init__(self, state: str | None = None, uri: str | None = None) -> None:
        self.database = Database(os.path.abspath(state) if state else default_state())
        self.uri = uri

    def names(self) -> tuple[str, ...]:
        """The machines that were added, sorted."""
        return trees.names(self.database, STANDALONE)

    def domains(self) -> tuple[Machine, ...]:
        """libvirt's domains, by name; none where no libvirt can be asked.

        :raise SnaptreeError: the connection that was named cannot be used.
        """
        from snaptree.machines import domains

        try:
            return domains.every(self.database, self.uri)
        except SnaptreeError:
            if domains.is_named(self.uri):
                raise
            return ()

    def machine(self, name: str) -> Machine:
        """A machine that was added, or a domain by name, UUID or id.

        :raise NotFoundError: there is none of that name.
        :raise SnaptreeError: it is a domain, and libvirt cannot be asked.
        """
        kept = trees.find_config(self.database, name)
        if kept is not None and kept.provider == STANDALONE:
            return Standalone(self.database, name)
        from snaptree.machines import domains

        why = domains.why_none(self.uri)
        try:
            found = domains.find(self.database, name, self.uri)
        except SnaptreeError as error:
            if domains.is_named(self.uri) or kept is not None:
                raise
            found, why = None, error.message
        if found is not None:
            return found
        if kept is not None and (now := domains.find_kept(self.database, kept)) is not None:
            raise NotFoundError(f"there is no domain {name!r} any more", f"it is called {now.name} now")
        known = ", ".join(self.names()) or "none yet"
        more = f" ({why})" if why else ", or see libvirt's domains with 'virsh list --all'"
        raise NotFoundError(f"there is no machine {name!r}", f"machines: {known}; add one with 'snaptree add'{more}")

    def standalone(self, name: str) -> Standalone:
        """A machine that was added.

        :raise NotFoundError: there is none of that name.
        :raise RefusedError: it is a domain.
        """
        found = self.machine(name)
        if not isinstance(found, Standalone):
            hint = f"use virsh for it: 'virsh start {name}', 'shutdown', 'edit', 'attach-disk', 'detach-disk'"
            raise RefusedError(f"{name} is a libvirt domain, and this is libvirt's to do", hint)
        return found

    def add(self, options: AddOptions, *, only_plan: bool = False, wait: float = 0.0) -> Plan:
        """Look after a machine.

        :raise ExistsError: there is a machine of that name, or one that owns one of the disks.
        :raise UnhealthyError: a chain is not sound.
        """
        if only_plan:
            return self._plan_add(options)
        import asyncio

        from snaptree.running import executor

        self._finish_forgotten(options.name, wait)
        lock = MachineLock()
        try:
            touched: list[str] = []
            while True:
                plan = self._plan_add(options)
                now = [path for path in plan.touches if os.path.exists(path)]
                if now == touched:
                    break
                # What was read before the lock was taken may have changed since.
                lock.acquire(now, wait)
                touched = now
            self.database.open()
            control = Control(options.name, "add")
            with heard(self.database.folder, control):
                asyncio.run(executor.run(self.database, options.name, plan, lock=lock, control=control))
        finally:
            lock.release()
        return plan

    def _plan_add(self, options: AddOptions) -> Plan:
        if options.name in trees.names(self.database):
            raise ExistsError(f"there is a machine {options.name!r} already", "choose another name, or remove it first")
        found = (find_disk(option, options.bases, adopt=options.adopt) for option in options.disks)
        disks = tuple(without_others(self.database, disk) for disk in found)
        for disk in disks:
            require_free(self.database, disk, adopt=options.adopt, monitor=options.qmp)
        keys: Mapping[str, str] = {}
        if options.keys:
            from snaptree.machines.keys import with_keys

            layers = dict.fromkeys(each.path for disk in disks for each in disk.every() if each.luks)
            keys = with_keys({}, options.keys, layers)
        records: tuple[FoundSnapshot, ...] = ()
        if options.from_xml is not None:
            from snaptree.machines.libvirt_xml import read_folder

            records = read_folder(options.from_xml)
        config = MachineConfig(
            name=options.name,
            bases=options.bases,
            nvram=existing(options.nvram),
            tpm=existing(options.tpm),
            qmp=options.qmp,
            start=checked_command(options.start) if options.start is not None else None,
            folder=options.folder,
            created=time.time(),
            agent=options.agent,
            keys=keys,
        )
        survey = read_survey(self.database, config, empty(options.name), beside=False)
        return add(survey, AddRequest(config, disks, options.adopt, records))

    def _finish_forgotten(self, name: str, wait: float) -> None:
        """Bring to their end operations of machines that are not known (any more): a removal that was killed, say.

        :raise BusyError: one of them is under way, and of a machine of this name.
        """
        for machine in dict.fromkeys(each.machine for each in operations.unfinished(self.database)):
            if machine in trees.names(self.database):
                continue
            try:
                self._recover_forgotten(machine, wait if machine == name else 0.0)
            except BusyError:
                if machine == name:
                    raise

    def _recover_forgotten(self, machine: str, wait: float) -> tuple[str, ...]:
        import asyncio

        from snaptree.running import recovery

        lock, control = MachineLock(), recovering(machine)
        try:
            with heard(self.database.folder, control):
                lock.acquire(recovery.files_of(self.database, machine), wait)
                return asyncio.run(recovery.recover(self.database, machine, lock, None, control))
        finally:
            lock.release()

    def operations(self, name: str | None = None) -> tuple[dict[str, Any], ...]:
        """What goes on and what waits, on one machine or on all: see ``under_way.operations_of``."""
        from snaptree.machines import under_way

        return under_way.operations_of(self.database, name)

    def cancel(
        self, name: str, *, everything: bool = False, told: Callable[[str], None] = lambda sentence: None
    ) -> tuple[dict[str, Any], ...]:
        """Stop what runs on a machine, in whatever process: see ``under_way.cancel``."""
        from snaptree.machines import under_way

        return under_way.cancel(self.database, name, everything=everything, told=told)

    def pause(self, name: str) -> tuple[dict[str, Any], ...]:
        """Let what runs on a machine rest: see ``under_way.pause``."""
        from snaptree.machines import under_way

        return under_way.pause(self.database, name)

    def resume(self, name: str) -> tuple[dict[str, Any], ...]:
        """Let what was paused on a machine go on."""
        from snaptree.machines import under_way

        return under_way.resume(self.database, name)

    def limit(self, name: str, speed: float) -> tuple[dict[str, Any], ...]:
        """Let what runs on a machine move so many bytes a second from now on; 0 for no limit."""
        from snaptree.machines import under_way

        return under_way.limit(self.database, name, speed)

    def recover(self, name: str | None = None, *, wait: float = 0.0) -> tuple[str, ...]:
        """Finish or undo what was killed, on one machine or on all; a sentence for each operation."""
        begun = (each.machine for each in operations.unfinished(self.database))
        waiting = dict.fromkeys((*begun, *trees.due(self.database)))
        known = trees.names(self.database)
        if name is not None and name not in waiting:
            return self.machine(name).recover(wait=wait)
        said: list[str] = []
        for each in [name] if name is not None else waiting:
            found = self._kept_as(each) if each in known else None
            said += found.recover(wait=wait) if found is not None else self._recover_forgotten(each, wait)
        return tuple(said)

    def _kept_as(self, name: str) -> Machine | None:
        """The machine of which something is kept under this name: a domain whatever it is called now, if it is there.

        :raise SnaptreeError: it is a domain, and libvirt cannot be asked.
        """
        kept = trees.load_config(self.database, name)
        if kept.provider == STANDALONE:
            return Standalone(self.database, name)
        from snaptree.machines import domains

        return domains.find_kept(self.database, kept)
