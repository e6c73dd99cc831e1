"""The verbs for programs: ``async with snaptree.connect() as machines``.

Each verb gives an :class:`Operation`: await it for its plan when it is done, iterate over it for progress.
"""

from __future__ import annotations

import asyncio
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
from snaptree.running.control import Control
from snaptree.running.pace import FREELY, Pace
from snaptree.running.progress import Progress, Report

Work = Callable[[Report, Control], Plan]


class Operation:
    """A verb being carried out. It begins when it is awaited or iterated over, and is carried out once.

    ``await operation`` gives its plan when it is done. ``async for progress in operation`` tells how far it is and ends
    with it. Both raise what the operation raises.
    """

    def __init__(self, work: Work, control: Control) -> None:
        self._work = work
        self._control = control
        self._task: asyncio.Task[Plan] | None = None
        self._queue: asyncio.Queue[Progress | None] = asyncio.Queue()

    def cancel(self) -> None:
        """Stop as Ctrl-C does: it is undone, or a commit pauses; whoever waits for it gets ``CancelledError``."""
        self._control.cancel()

    def pause(self) -> None:
        """Let no data move until :meth:`resume`.

        :raise RefusedError: there is nothing left to do that can be paused.
        """
        self._control.pause()

    def resume(self) -> None:
        """Let data move again."""
        self._control.resume()

    def limit(self, bytes_per_second: float) -> None:
        """Let so many bytes a second move from now on; 0 for no limit."""
        self._control.limit(bytes_per_second)

    def tell(self) -> dict[str, Any]:
        """Where it stands, as ``operations --json`` prints it."""
        return self._control.tell()

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
            return await asyncio.to_thread(self._work, tell, self._control)
        finally:
            self._queue.put_nowait(None)


class Machine:
    """One machine, by name. The verbs are those of the command line, with the same meaning and errors."""

    def __init__(self, state: str | None, name: str, uri: str | None = None) -> None:
        self._state = state
        self._uri = uri
        self.name = name

    def _door(self) -> Connection:
        return Connection(self._state, self._uri)

    async def show(self) -> dict[str, Any]:
        """The machine as ``show --json`` prints it."""
        return await asyncio.to_thread(lambda: report.show(self._door().machine(self.name).view()))

    async def start(self, *, wait: float = 0.0) -> str:
        """Start the machine from its stored command, on its active tips; what it does then, ``running`` or ``paused``.

        :param wait: for how many seconds to wait while another operation has the machine.
        :raise BusyError: it runs already, or another operation has it.
        :raise RefusedError: its monitor is one that somebody else's QEMU has.
        :raise ToolError: QEMU does not start.
        :raise UsageError: it has no start command.
        """

        def work() -> str:
            from snaptree.machines import switching

            return switching.start(self._door().standalone(self.name), wait=wait)

        return await asyncio.to_thread(work)

    async def stop(self, *, within: float = 60.0, force: bool = False, wait: float = 0.0) -> str:
        """Ask the guest to shut down, and turn it off when it has not done so in time; in words how it ended.

        :param within: so many seconds the guest may take.
        :param force: turn it off at once, as by pulling the plug.
        :raise BusyError: its monitor tells us nothing, or another operation has the machine.
        :raise RefusedError: it is paused, so that it cannot hear us.
        """

        def work() -> str:
            from snaptree.machines import switching

            machine = self._door().standalone(self.name)
            return switching.stop(machine, seconds=within, force=force, wait=wait)

        return await asyncio.to_thread(work)

    async def verify(self) -> tuple[Finding, ...]:
        """What in the machine's files is not as its tree says."""
        return await asyncio.to_thread(lambda: self._door().machine(self.name).verify())

    async def plan(self, request: Request) -> Plan:
        """The plan for a request; nothing is touched."""
        return await asyncio.to_thread(lambda: self._door().machine(self.name).plan(request))

    def operate(self, request: Request, *, wait: float = 0.0, pace: Pace = FREELY) -> Operation:
        """Carry out a request; the verbs below make it."""

        def work(tell: Report, control: Control) -> Plan:
            machine = self._door().machine(self.name)
            return machine.run(request, wait=wait, progress=tell, control=control)

        return Operation(work, Control(self.name, pace=pace))

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
        quiesce: bool = False,
    ) -> Operation:
        """Take a snapshot, with ``memory`` of a machine that runs; with ``quiesce`` the guest's agent freezes its file
        systems meanwhile."""
        chosen = dict(files or {})
        return self.operate(SnapshotRequest(name, internal, exclude, chosen, description, memory, memory_file, quiesce))

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
        pace: Pace = FREELY,
    ) -> Operation:
        """Go back to a snapshot; the work of now is parked unless ``discard``.

        :param power: what the machine does afterwards, ``off``, ``paused`` or ``running``; as it does now without it.
        :param memory: whether memory is loaded, and that of now parked; ``None``: where the snapshot has some.
        """
        request = RevertRequest(name, discard, keep_as, delete, children, dict(files or {}), power, memory)
        return self.operate(request, pace=pace)

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

        def work(tell: Report, control: Control) -> Plan:
            machine = self._door().standalone(self.name)
            return machine.run(machine.attach_request(disk, bases, adopt=adopt), progress=tell, control=control)

        return Operation(work, Control(self.name))

    def detach(self, target: str, *, delete_files: bool = False) -> Operation:
        """Let a disk go."""
        return self.operate(DetachRequest(target, delete_files))

    def remove(self, *, delete_files: bool = False) -> Operation:
        """Forget the machine."""
        return self.operate(RemoveRequest(delete_files))

    def recover(self) -> asyncio.Future[tuple[str, ...]]:
        """Finish or undo what was killed; a sentence for each operation."""
        return asyncio.ensure_future(asyncio.to_thread(lambda: self._door().machine(self.name).recover()))

    async def operations(self) -> tuple[dict[str, Any], ...]:
        """What goes on and what waits on the machine, in whatever process, as ``operations --json`` prints it."""
        return await asyncio.to_thread(lambda: self._door().operations(self.name))

    async def cancel(self, *, everything: bool = False) -> tuple[dict[str, Any], ...]:
        """Stop what runs on the machine, in whatever process, and wait until it has; how each ended.

        :param everything: also what waits for its turn.
        :raise NotFoundError: nothing runs there.
        :raise RefusedError: it has come to its end, or must.
        :raise BusyError: its process does not answer.
        """
        return await asyncio.to_thread(lambda: self._door().cancel(self.name, everything=everything))

    async def pause(self) -> tuple[dict[str, Any], ...]:
        """Let what runs on the machine, in whatever process, move no data; where it stands then. Errors as above."""
        return await asyncio.to_thread(lambda: self._door().pause(self.name))

    async def resume(self) -> tuple[dict[str, Any], ...]:
        """Let what was paused go on."""
        return await asyncio.to_thread(lambda: self._door().resume(self.name))

    async def limit(self, bytes_per_second: float) -> tuple[dict[str, Any], ...]:
        """Let what runs on the machine move so many bytes a second from now on; 0 for no limit."""
        return await asyncio.to_thread(lambda: self._door().limit(self.name, bytes_per_second))


class Machines:
    """The machines of one state folder, and libvirt's domains; an asynchronous context.

    :param uri: the connection to libvirt; without it ``LIBVIRT_DEFAULT_URI``, or a daemon of the system's that runs.
    """

    def __init__(self, state: str | None = None, uri: str | None = None) -> None:
        self._state = state
        self._uri = uri

    def _door(self) -> Connection:
        return Connection(self._state, self._uri)

    async def __aenter__(self) -> Machines:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __iter__(self) -> Iterator[str]:
        door = self._door()
        return iter((*door.names(), *(each.name for each in door.domains())))

    def __getitem__(self, name: str) -> Machine:
        """A machine by name; that there is one is found out by what is done with it."""
        return Machine(self._state, name, self._uri)

    async def operations(self) -> tuple[dict[str, Any], ...]:
        """What goes on and what waits on all machines, in whatever process, as ``operations --json`` prints it."""
        return await asyncio.to_thread(lambda: self._door().operations())

    async def add(self, options: AddOptions) -> Machine:
        """Look after a machine.

        :raise SnaptreeError: its disks are not what they should be, or the name is taken.
        """
        await asyncio.to_thread(lambda: self._door().add(options))
        return Machine(self._state, options.name, self._uri)


__all__ = ["Machine", "Machines", "Operation", "SnaptreeError"]
