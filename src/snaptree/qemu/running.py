"""A QEMU that runs a machine, over its monitor."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from types import TracebackType
from typing import Any

from msgspec.structs import replace

from snaptree.errors import BusyError, ToolError
from snaptree.images import durable
from snaptree.images.locks import open_in
from snaptree.model.live import PAUSED, RUNNING
from snaptree.qemu import jobs
from snaptree.qemu.dialling import dial, peer_of
from snaptree.qemu.graph import BlockGraph, Inode, Node, read_graph
from snaptree.qemu.session import GREETING_SECONDS, QmpSession, not_negotiated, properties, sense

ATTEMPTS = 3
"""So often a session is begun: an event that QEMU sends just then comes before its answer, as when a guest starts."""


async def run_state(qmp: QmpSession) -> str:
    """What the machine does, in QEMU's word (``running``, ``paused``, ``inmigrate``, ``shutdown`` …).

    :raise ToolError: the answer makes no sense.
    """
    answer = await qmp.execute("query-status")
    with sense(qmp.name, "status", answer):
        return str(answer["status"])


def state_of(word: str) -> str:
    """``running`` for QEMU's word for that, ``paused`` for whatever else keeps the guest from running."""
    return RUNNING if word == "running" else PAUSED


class RunningQemu:
    """A monitor that has greeted us, and the process at its other end. It serves us alone while we have it.

    Made by :meth:`attach`.
    """

    def __init__(self, qmp: QmpSession, connection: socket.socket, line: socket.socket, pid: int, path: str) -> None:
        self.qmp = qmp
        self._connection = connection
        self._line = line
        """The same connection: the session closes its own when it comes apart, and QEMU hears nobody else until all are
        closed."""
        self.pid = pid
        self.path = path
        self._folder: str | None = None

    @classmethod
    async def attach(cls, path: str, seconds: float = GREETING_SECONDS) -> RunningQemu | None:
        """Connect to the monitor; ``None`` when nothing listens there.

        :param seconds: how long it may take to greet us.
        :raise ToolError: somebody listens and does not greet us: the monitor is held by another client, or is none.
        """
        left = ATTEMPTS
        while True:
            left -= 1
            found = dial(path)
            if found is None:
                return None
            pid = peer_of(found).process
            qmp = QmpSession(f"the QEMU at {path}")
            line = None
            try:
                line = found.dup()
                found.setblocking(False)
                await qmp.connect(found, seconds)
            except BaseException as error:
                found.close()
                if line is not None:
                    line.close()
                if left and isinstance(error, ToolError) and not_negotiated(error):
                    continue
                raise
            return cls(qmp, found, line, pid, path)

    @property
    def descriptor(self) -> int:
        """The monitor's socket, for a process that shares it.

        :raise ToolError: QEMU has hung up.
        """
        found = self._connection.fileno()
        if found < 0:
            raise ToolError(f"{self.qmp.name} went away")
        return found

    def pass_descriptor(self, descriptor: int) -> None:
        """Send an open file along; the command that comes next says what it is for.

        :raise ToolError: QEMU is gone.
        """
        try:
            socket.send_fds(self._connection, [b" "], [descriptor])
        except OSError as error:
            raise ToolError(f"{self.qmp.name} takes no file: {error.strerror}") from error

    async def __aenter__(self) -> RunningQemu:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the monitor back; the machine runs on."""
        await self.qmp.close()
        self._line.close()

    async def hang_up(self) -> None:
        """End a session that has come apart on our side, for all who share its socket: QEMU hears nobody else before.

        A guard among them can then do no more than when QEMU has hung up itself.
        """
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)
        await self.close()

    async def run_state(self) -> str:
        """What the machine does, in QEMU's word."""
        return await run_state(self.qmp)

    async def answers(self) -> bool:
        """Whether it still answers on this session."""
        try:
            await self.run_state()
        except ToolError:
            return False
        return True

    async def state(self) -> str:
        """``running``, or ``paused`` for whatever else keeps the guest from running."""
        return state_of(await self.run_state())

    async def commands(self) -> frozenset[str]:
        """What the monitor can be asked for."""
        answer = await self.qmp.execute("query-commands")
        with sense(self.qmp.name, "commands", answer):
            return frozenset(str(each["name"]) for each in answer)

    async def graph(self) -> BlockGraph:
        """The block graph as it is now.

        Asked for it while a finished stream has not been dismissed, QEMU dies (7.2.22, 10.0.2): the filter above what
        it has copied is listed still, and has nothing beneath it any more.

        :raise ToolError: somebody's stream is like that, or the answer makes no sense.
        """
        await jobs.dismiss_streams(self.qmp)
        told = await self.qmp.execute("query-named-block-nodes", flat=True)
        edges = await self.qmp.execute("x-debug-query-block-graph")
        devices = await self.qmp.execute("query-block")
        found = read_graph(told, edges, devices, self.folder())
        if not any(node.encrypted for node in found.nodes.values()):
            return found
        # One may be deleted again as soon as the image is open.
        objects = await properties(self.qmp, "/objects")
        return replace(found, keys=frozenset(name for name, kind in objects if kind == "child<secret>"))

    async def open_files(self) -> frozenset[Inode]:
        """The files that it has open, by device and inode."""
        return (await self.graph()).files()

    def descriptors(self) -> frozenset[Inode]:
        """The files that its process has open, whatever their names lead to by now; none when we may not know."""
        return open_in(self.pid)

    def command_line(self) -> tuple[str, ...]:
        """The words that started it; none when we may not know them."""
        try:
            with open(f"/proc/{self.pid}/cmdline", "rb") as file:
                return tuple(os.fsdecode(word) for word in file.read().split(b"\0"))
        except OSError:
            return ()

    def folder(self) -> str:
        """Its working folder, which relative names start from."""
        if self._folder is None:
            try:
                self._folder = os.readlink(f"/proc/{self.pid}/cwd")
            except OSError:
                # Of somebody else's process we may not know it; relative names then lead nowhere.
                self._folder = "/nonexistent"
        return self._folder

    async def flush(self, node: str, path: str) -> None:
        """Have everything written to an image that QEMU holds back, tables too, and see that it is on disk.

        There is no command for it but in the human monitor, which says nothing when a flush fails. What it has written
        is synced here, so that a disk that fails is told of; whether the tables are there the caller sees on the file.

        :raise IoError: the file cannot be synced.
        :raise BusyError: a job of somebody's keeps the image's requests waiting: QEMU would wait for this one for good,
            and do nothing else.
        :raise ToolError: QEMU does not know the node.
        """
        if waiting := await jobs.standing(self.qmp):
            found = (await self.graph()).nodes.get(node)
            for job in set(waiting).intersection(found.jobs if found is not None else ()):
                hint = f"tell its monitor: job-finalize, or job-cancel, with id {job!r}"
                raise BusyError(f"QEMU's job {job} waits to be finalized, and until then {path} is not flushed", hint)
        # Its words are quoted with double quotes alone: QEMU's own names begin with a sign that a shell would mind.
        said = await self.qmp.execute("human-monitor-command", command_line=f'qemu-io "{node}" flush')
        if said:
            raise ToolError(f"{self.qmp.name} did not flush {path}: {str(said).strip()}")
        durable.sync_file(path)

    async def reopen(self, node: Node, *, writing: bool | None = None, backing: str | None = None) -> None:
        """Have an image reopened for writing or for reading only, or standing on another node, with every other option
        as it is.

        ``blockdev-reopen`` resets the options that it is not told, of which the monitor does not tell, and takes no
        node whose name QEMU has made up. The human monitor's command keeps them, but for ``detect-zeroes`` where it
        came with ``-drive``.

        :raise ToolError: QEMU cannot.
        """
        changed = {"detect-zeroes": node.detect_zeroes, **({"backing": backing} if backing is not None else {})}
        options = ",".join(f"{key}={value}" for key, value in changed.items())
        way = {None: "", True: "-w ", False: "-r "}[writing]
        said = await self.qmp.execute(
            "human-monitor-command", command_line=f'qemu-io "{node.name}" "reopen {way}-o {options}"'
        )
        if said:
            raise ToolError(f"{self.qmp.name} did not reopen {node.name}: {str(said).strip()}")

    async def blockdev_del(self, name: str) -> None:
        """Close a node that was opened by name."""
        await self.qmp.execute("blockdev-del", node_name=name)

    async def add(self, blockdev: dict[str, Any]) -> None:
        """Open an image, given as ``BlockdevOptions``."""
        await self.qmp.execute("blockdev-add", **blockdev)
