"""What standalone machines and libvirt's domains have in common: how a machine looks, and how a verb is carried out."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from msgspec import Struct

from snaptree.errors import BusyError, NotFoundError, RefusedError
from snaptree.images.locks import MachineLock
from snaptree.machines import due
from snaptree.machines.findings import Finding
from snaptree.model.layer import LayerId
from snaptree.model.machine import MachineConfig
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.paths import opened_at
from snaptree.planning.accept import AcceptRequest
from snaptree.planning.health import Ailment
from snaptree.planning.naming import renamed_roots
from snaptree.planning.plan import Plan
from snaptree.planning.settle import loose_layers
from snaptree.planning.verbs import RemoveRequest, RenameRequest, Request, SetRequest
from snaptree.running import loops
from snaptree.running.control import Control, recovering
from snaptree.running.journal import LogEntry, log
from snaptree.running.listening import heard
from snaptree.running.loops import LoopNeededError
from snaptree.running.pace import FREELY, Pace
from snaptree.running.progress import Report
from snaptree.store import operations
from snaptree.store.database import Database


class View(Struct, frozen=True):
    """A machine as it is now: what is remembered and what was read.

    ``state`` is ``off``, ``running``, ``paused`` or ``unknown``.

    ``pending`` says in sentences what an interrupted operation or a waiting merge has left to do, ``notes`` what else
    there is to know: disks that are left alone, say.
    """

    config: MachineConfig
    tree: Tree
    survey: Survey
    ailments: Mapping[LayerId, Ailment]
    pending: tuple[str, ...]
    state: str
    why: str = ""
    """What keeps snaptree from knowing more of its state, if anything."""
    notes: tuple[str, ...] = ()


class Machine(ABC):
    """One machine, standalone or a domain: all that the command line and programs ask of either.

    One verb at a time is carried out, under the machine's lock.
    """

    database: Database
    config: MachineConfig

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.config.name

    @property
    def key(self) -> str:
        """Under which name it is kept in the state file."""
        return self.name

    @abstractmethod
    def tree(self) -> Tree:
        """The tree as it is now."""

    @abstractmethod
    def view(self, *, deep: bool = False) -> View:
        """The machine as it is now; takes no lock.

        :param deep: also look for overlays beside the layers.
        """

    @abstractmethod
    def plan(self, request: Request) -> Plan:
        """The plan for a request; takes no lock and touches nothing."""

    def verify(self) -> tuple[Finding, ...]:
        """Check the files against the tree, and libvirt's records of a domain against both; takes no lock."""
        from snaptree.machines.verify import settled

        return settled(self.database, self._findings)

    @abstractmethod
    def _findings(self) -> tuple[Finding, ...]:
        """What is found by looking once."""

    @abstractmethod
    def snapshot_xml(self, name: str) -> str:
        """One snapshot as libvirt's domainsnapshot XML.

        :raise NotFoundError: there is no such snapshot.
        """

    @abstractmethod
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

    @abstractmethod
    async def settle(self, lock: MachineLock, control: Control | None = None) -> tuple[str, ...]:
        """Finish or undo what was killed, under the machine's lock."""

    @abstractmethod
    async def go_on(self) -> bool:
        """Start the machine where it is off only for an operation that has come to its end, or has never begun;
        whether that was to be done.

        :raise SnaptreeError: it does not start.
        """

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

    @contextmanager
    def locked(self, wait: float, cancelled: threading.Event | None = None) -> Iterator[MachineLock]:
        """Have the machine to ourselves: no other snaptree works on it meanwhile."""
        lock = MachineLock()
        try:
            deadline = time.monotonic() + wait
            found: dict[str, tuple[int, int]] = {}
            # While it waited, the one before may have moved the machine to other files, removed these, or put others
            # in their place.
            while (now := anchors(self.tree())) != found:
                with suppress(NotFoundError):
                    lock.acquire(now, max(0.0, deadline - time.monotonic()), cancelled)
                    found = now
            yield lock
        finally:
            lock.release()

    def recover(self, *, wait: float = 0.0) -> tuple[str, ...]:
        """Finish or undo what was killed; a sentence for each operation."""
        import asyncio

        if not operations.unfinished(self.database, self.key) and due.noted(self.database, self.key) is None:
            return ()
        control = recovering(self.name)
        with heard(self.database.folder, control), self.locked(wait) as lock:
            return asyncio.run(self._recover(lock, control))

    async def _recover(self, lock: MachineLock, control: Control) -> tuple[str, ...]:
        said = await self.settle(lock, control)
        return (*said, *([f"{self.name} had been turned off, and was started again"] if await self.go_on() else ()))

    async def begin(self, request: Request, lock: MachineLock, control: Control) -> None:
        """What each operation begins with: what was killed is brought to its end."""
        await self.settle(lock, control)
        if not isinstance(request, RemoveRequest):
            await self.go_on()

    def unfinished(self) -> tuple[str, ...]:
        """A sentence for each operation that is under way or was killed."""
        return tuple(
            f"{each.summary}: under way, or interrupted ('snaptree recover {self.name}' finishes or undoes it)"
            for each in operations.unfinished(self.database, self.key)
        )

    def pending(self, tree: Tree, survey: Survey) -> tuple[str, ...]:
        """What an interrupted operation or a waiting merge has left to do, in sentences."""
        outsiders = frozenset(each.layer for each in survey.outsiders)
        waiting = [
            f"{tree.layers[number].path} waits to be merged ('snaptree gc {self.name}')"
            for number in sorted(loose_layers(tree, outsiders))
        ]
        waiting += [
            f"{root.path} gets the name {tree.roots[disk][0]} back when the machine has stopped"
            for disk, root in renamed_roots(tree).items()
        ]
        if not survey.running:
            waiting += due.waiting(self.database, self.key, self.name)
        return (*self.unfinished(), *waiting)

    def log(self) -> tuple[LogEntry, ...]:
        """The machine's operations, oldest first."""
        return log(self.database, self.key)


def anchors(tree: Tree) -> dict[str, tuple[int, int]]:
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


def folders_of(request: Request) -> list[str]:
    """The folders that the user chose for new files."""
    files: Mapping[str, str] = getattr(request, "files", {})
    memory: str | None = getattr(request, "memory_file", None)
    return [os.path.dirname(path) for path in (*files.values(), *([memory] if memory is not None else []))]


def still(tree: Tree, request: Request) -> list[str]:
    """What nobody may begin to write to meanwhile: the active tips, where the machine has to be off, and a layer that
    is taken for what it is."""
    if isinstance(request, RenameRequest | SetRequest):
        return []
    tips = [tree.layers[tip.layer].path for tip in tree.branches[tree.active].tips.values()]
    return [*tips, request.path] if isinstance(request, AcceptRequest) else tips


def seen(tree: Tree, request: Request) -> dict[str, tuple[int, int] | None]:
    """What is at each path that a plan rests on (device and inode): the layers, and the folders of new files."""
    folders = folders_of(request)
    found: dict[str, tuple[int, int] | None] = {}
    for path in (*(layer.path for layer in tree.layers.values()), *folders):
        try:
            status = os.stat(path) if path in folders else os.lstat(opened_at(path))
        except OSError:
            found[path] = None
        else:
            found[path] = (status.st_dev, status.st_ino)
    return found


def require_same(tree: Tree, request: Request, before: Mapping[str, tuple[int, int] | None]) -> None:
    """See that what a plan rests on is still what it was when it was planned.

    :raise BusyError: somebody has put another file in the place of one.
    """
    moved = sorted(path for path, inode in seen(tree, request).items() if inode != before[path])
    if moved:
        raise BusyError(f"{moved[0]} has been replaced since it was planned", "see what did it, and try again")


def require_real_folders(request: Request) -> None:
    """See that the user's folders for new files are no links, and reached through none.

    :raise RefusedError: names the folder.
    """
    for folder in map(os.path.abspath, folders_of(request)):
        if os.path.realpath(folder) != folder:
            hint = f"name the folder itself, {os.path.realpath(folder)}"
            raise RefusedError(f"{folder} is or leads through a symbolic link", hint)
