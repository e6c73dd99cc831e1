"""The door to all machines of a state folder."""

from __future__ import annotations

import os
import time

from snaptree.errors import BusyError, ExistsError
from snaptree.images.locks import MachineLock, probe, who_has_open
from snaptree.machines.finding import find_disk
from snaptree.machines.options import AddOptions
from snaptree.machines.standalone import Standalone, existing
from snaptree.machines.survey import read_survey
from snaptree.model.machine import MachineConfig
from snaptree.planning.adopt import AddRequest, FoundDisk, FoundSnapshot, add, empty
from snaptree.planning.plan import Plan
from snaptree.store import operations, trees
from snaptree.store.database import Database, default_state


class Connection:
    """The machines of one state folder (``$SNAPTREE_STATE`` or the default). Making the object reads nothing."""

    def __init__(self, state: str | None = None) -> None:
        self.database = Database(os.path.abspath(state) if state else default_state())

    def names(self) -> tuple[str, ...]:
        """The machines that were added, sorted."""
        return trees.names(self.database)

    def machine(self, name: str) -> Standalone:
        """A machine that was added.

        :raise NotFoundError: there is none of that name.
        """
        return Standalone(self.database, name)

    def add(self, options: AddOptions, *, only_plan: bool = False, wait: float = 0.0) -> Plan:
        """Look after a machine.

        :raise ExistsError: there is a machine of that name, or one that owns one of the disks.
        :raise UnhealthyError: a chain is not sound.
        """
        if options.name in self.names():
            raise ExistsError(f"there is a machine {options.name!r} already", "choose another name, or remove it first")
        disks = tuple(find_disk(option, options.bases, adopt=options.adopt) for option in options.disks)
        self._require_free(disks, options)
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
            start=options.start,
            created=time.time(),
        )
        survey = read_survey(self.database, config, empty(options.name), beside=False)
        plan = add(survey, AddRequest(config, disks, options.adopt, records))
        if only_plan:
            return plan
        import asyncio

        from snaptree.running import executor

        lock = MachineLock()
        try:
            lock.acquire([path for path in plan.touches if os.path.exists(path)], wait)
            asyncio.run(executor.run(self.database, options.name, plan))
        finally:
            lock.release()
        return plan

    def recover(self, name: str | None = None, *, wait: float = 0.0) -> tuple[str, ...]:
        """Finish or undo what was killed, on one machine or on all; a sentence for each operation."""
        if name is not None:
            return self.machine(name).recover(wait=wait)
        import asyncio

        from snaptree.running import recovery

        said: list[str] = []
        for each in dict.fromkeys(operation.machine for operation in operations.unfinished(self.database)):
            if each in self.names():
                said += self.machine(each).recover(wait=wait)
            else:
                said += asyncio.run(recovery.recover(self.database, each))
        return tuple(said)

    def _require_free(self, disks: tuple[FoundDisk, ...], options: AddOptions) -> None:
        """Refuse disks that another machine owns or that a program has open for writing."""
        for disk in disks:
            owned = disk.chain if options.adopt else disk.chain[:1]
            for facts in owned:
                owners = trees.owners_of(self.database, facts.path)
                if owners:
                    raise ExistsError(
                        f"{facts.path} belongs to machine {owners[0]!r}",
                        "make an overlay on it (qemu-img create -b) and add that",
                    )
                conflict = probe(facts.path)
                if conflict is not None and conflict.writing:
                    who = ", ".join(who_has_open((facts.path,)).get(facts.path, ())) or "another process"
                    raise BusyError(f"{facts.path} is open for writing by {who}", "stop it, then add the machine")
