"""The verbs for programs: ``async with snaptree.connect() as machines``.

Each verb gives an :class:`Operation`: await it for its plan when it is done, iterate over it for progress.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from types import TracebackType
from typing import Any

from snaptree.errors import SnaptreeError
from snaptree.machines import report
from snaptree.machines.connection import Connection
from snaptree.machines.findings import Finding
from snaptree.machines.options import AddOptions, DiskOption
from snaptree.planning.accept import AcceptRequest
from snaptree.planning.adopt import DetachRequest
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.sweep import SquashRequest
from snaptree.planning.verbs import DeleteBranchRequest, GcRequest, RemoveRequest, RenameRequest, Request
from snaptree.running.pace import FREELY, Pace
from snaptree.running.progress import Progress, Report

Work = Callable[[Report, threading.Event], Plan]


class Operation:
    """A verb being carried out. It begins when it is awaited or iterated over, and is carried out once.

    ``await operation`` gives its plan when it is done. ``async for progress in operation`` tells how far it is and ends
    with it. Both raise what the operation raises.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._stop = threading.Event()
        self._task: asyncio.Task[Plan] | None = None
        self._queue: asyncio.Queue[Progress | None] = asyncio.Queue()

    def cancel(self) -> None:
        """Stop as Ctrl-C does: it is undone, or a commit pauses; whoever waits for it gets ``CancelledError``."""
        self._stop.set()

    def __await__(self) -> Generator[Any, None, Plan]:
        return self._started().__await__()

    async def __aiter__(self) -> AsyncIterator[Progress]:
        task = self._started()
        try:
            while (progress := await self._queue.get()) is not None:
                yield progress
        finally:
            # Whoever stops listening does not stop the operation.
            await asyncio.shield(task)

    def _started(self) -> asyncio.Task[Plan]:
        if self._task is None:
            self._task = asyncio.ensure_future(self._run(asyncio.get_running_loop()))
        return self._task

    async def _run(self, loop: asyncio.AbstractEventLoop) -> Plan:
        def tell(progress: Progress) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, progress)

        try:
            # Files are synced and QEMU's tools waited for: not in the caller's event loop.
            return await asyncio.to_thread(self._work, tell, self._stop)
        finally:
            self._queue.put_nowait(None)


class Machine:
    """One machine, by name. The verbs are those of the command line, with the same meaning and errors."""

    def __init__(self, state: str | None, name: str) -> None:
        self._state = state
        self.name = name

    async def show(self) -> dict[str, Any]:
        """The machine as ``show --json`` prints it."""
        return await asyncio.to_thread(lambda: report.show(Connection(self._state).machine(self.name).view()))

    async def verify(self) -> tuple[Finding, ...]:
        """What in the machine's files is not as its tree says."""
        return await asyncio.to_thread(lambda: Connection(self._state).machine(self.name).verify())

    async def plan(self, request: Request) -> Plan:
        """The plan for a request; nothing is touched."""
        return await asyncio.to_thread(lambda: Connection(self._state).machine(self.name).plan(request))

    def operate(self, request: Request, *, wait: float = 0.0, pace: Pace = FREELY) -> Operation:
        """Carry out a request; the verbs below make it."""

        def work(tell: Report, stop: threading.Event) -> Plan:
            machine = Connection(self._state).machine(self.name)
            return machine.run(request, wait=wait, pace=pace, progress=tell, cancelled=stop)

        return Operation(work)

    def snapshot(
        self,
        name: str,
        *,
        internal: bool = False,
        exclude: tuple[str, ...] = (),
        files: Mapping[str, str] | None = None,
        description: str = "",
        memory: bool = False,
        memory_file: str | None = None,
    ) -> Operation:
        """Take a snapshot, with ``memory`` of a machine that runs."""
        chosen = dict(files or {})
        return self.operate(SnapshotRequest(name, internal, exclude, chosen, description, memory, memory_file))

    def delete(
        self,
        *names: str,
        merge: str = "auto",
        children: bool = False,
        children_only: bool = False,
        with_branches: bool = False,
        memory_only: bool = False,
        pace: Pace = FREELY,
    ) -> Operation:
        """Delete snapshots; what becomes loose is merged."""
        return self.operate(DeleteRequest(names, merge, children, children_only, with_branches, memory_only), pace=pace)

    def delete_branch(self, name: str, *, merge: str = "auto") -> Operation:
        """Delete a parked branch."""
        return self.operate(DeleteBranchRequest(name, merge))

    def revert(
        self,
        name: str,
        *,
        discard: bool = False,
        keep_as: str | None = None,
        delete: bool = False,
        children: bool = False,
        files: Mapping[str, str] | None = None,
        power: str | None = None,
        memory: bool | None = None,
    ) -> Operation:
        """Go back to a snapshot; the work of now is parked unless ``discard``.

        :param power: what the machine does afterwards: ``running``, ``paused`` or ``off``.
        :param memory: whether memory is loaded, and that of now parked; ``None``: where the snapshot has some.
        """
        return self.operate(RevertRequest(name, discard, keep_as, delete, children, dict(files or {}), power, memory))

    def branch(self, name: str, *, source: str | None = None, files: Mapping[str, str] | None = None) -> Operation:
        """Grow a branch from a snapshot (``source``) or from here."""
        return self.operate(BranchRequest(name, source, dict(files or {})))

    def switch(
        self,
        name: str,
        *,
        files: Mapping[str, str] | None = None,
        power: str | None = None,
        memory: bool | None = None,
    ) -> Operation:
        """Work on another branch; ``power`` and ``memory`` are as for going back."""
        return self.operate(SwitchRequest(name, dict(files or {}), power, memory))

    def rename(self, old: str, new: str) -> Operation:
        """Give a snapshot or a branch another name."""
        return self.operate(RenameRequest(old, new))

    def squash(
        self, disk: str, *, top: str | None = None, base: str | None = None, merge: str = "auto", pace: Pace = FREELY
    ) -> Operation:
        """Merge by file."""
        return self.operate(SquashRequest(disk, top, base, merge), pace=pace)

    def accept(self, path: str) -> Operation:
        """Take a frozen layer that was changed from outside for what it is now."""
        return self.operate(AcceptRequest(path))

    def gc(self, *, delete: bool = False, pace: Pace = FREELY) -> Operation:
        """Do the merges that wait."""
        return self.operate(GcRequest(delete), pace=pace)

    def attach(self, disk: DiskOption, *, bases: tuple[str, ...] = (), adopt: bool = False) -> Operation:
        """Look after one more disk."""

        def work(tell: Report, stop: threading.Event) -> Plan:
            machine = Connection(self._state).machine(self.name)
            return machine.run(machine.attach_request(disk, bases, adopt=adopt), progress=tell, cancelled=stop)

        return Operation(work)

    def detach(self, target: str, *, delete_files: bool = False) -> Operation:
        """Let a disk go."""
        return self.operate(DetachRequest(target, delete_files))

    def remove(self, *, delete_files: bool = False) -> Operation:
        """Forget the machine."""
        return self.operate(RemoveRequest(delete_files))

    def recover(self) -> asyncio.Future[tuple[str, ...]]:
        """Finish or undo what was killed; a sentence for each operation."""
        return asyncio.ensure_future(asyncio.to_thread(lambda: Connection(self._state).machine(self.name).recover()))


class Machines:
    """The machines of one state folder; an asynchronous context."""

    def __init__(self, state: str | None = None) -> None:
        self._state = state

    async def __aenter__(self) -> Machines:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(Connection(self._state).names())

    def __getitem__(self, name: str) -> Machine:
        """A machine by name; that there is one is found out by what is done with it."""
        return Machine(self._state, name)

    async def add(self, options: AddOptions) -> Machine:
        """Look after a machine.

        :raise SnaptreeError: its disks are not what they should be, or the name is taken.
        """
        await asyncio.to_thread(lambda: Connection(self._state).add(options))
        return Machine(self._state, options.name)


__all__ = ["Machine", "Machines", "Operation", "SnaptreeError"]
