"""qemu-storage-daemon: QEMU's block layer without a machine, for one operation."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import tempfile
from types import TracebackType
from typing import Any

from snaptree.errors import SnaptreeError
from snaptree.images import child
from snaptree.images.child import ends_with_us, find_tool
from snaptree.images.qemu_img import NO_KEYS, Keys, keys_for, opening
from snaptree.qemu import jobs
from snaptree.qemu.session import QmpSession

QUIT_SECONDS, END_SECONDS = 30.0, 60.0
"""So long it may take to answer that it is to end, and to end; when something has failed already, HASTE_SECONDS."""
HASTE_SECONDS = 2.0


class StorageDaemon:
    """A daemon that lives as long as the ``async with`` block, and dies with us.

    Its monitor is one end of a socket pair: there is no file to protect, and nobody else can connect.
    """

    def __init__(self) -> None:
        self.qmp = QmpSession("qemu-storage-daemon")
        self._process: subprocess.Popen[bytes] | None = None
        self._given: set[str] = set()
        """The objects with keys that it has."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the daemon

    @property
    def pid(self) -> int:
        """The daemon's process."""
        assert self._process is not None
        return self._process.pid

    async def __aenter__(self) -> StorageDaemon:
        program = find_tool("qemu-storage-daemon")
        ours, theirs = socket.socketpair()
        theirs.set_inheritable(True)
        try:
            self._process = subprocess.Popen(
                [program, "--chardev", f"socket,id=m,fd={theirs.fileno()}", "--monitor", "chardev=m"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                close_fds=False,
                start_new_session=True,
                preexec_fn=ends_with_us(),
            )
        finally:
            theirs.close()
        try:
            await self.qmp.connect(ours)
        except BaseException:
            self._kill()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        try:
            await self.qmp.execute("quit", seconds=QUIT_SECONDS if kind is None else HASTE_SECONDS)
        except SnaptreeError:
            # It may close the connection before its answer has come through.
            pass
        finally:
            await self.qmp.close()
            await self._wait(END_SECONDS if kind is None else HASTE_SECONDS)

    async def _wait(self, seconds: float) -> None:
        assert self._process is not None
        deadline = asyncio.get_running_loop().time() + seconds
        while self._process.poll() is None:
            if asyncio.get_running_loop().time() > deadline:
                self._kill()
                return
            await asyncio.sleep(0.002)

    def _kill(self) -> None:
        if self._process is not None:
            child.kill(self._process, self.qmp.name)

    async def add(self, blockdev: dict[str, Any], keys: Keys = NO_KEYS) -> None:
        """Open an image, given as ``BlockdevOptions``.

        :raise NoKeyError: it is encrypted, and its key is not among these, or does not open it.
        """
        with opening(blockdev["file"]["filename"]):
            for name, path in keys_for(blockdev, keys).items():
                if name not in self._given:
                    await self.qmp.execute("object-add", qom_type="secret", id=name, file=path)
                    self._given.add(name)
            await self.qmp.execute("blockdev-add", **blockdev)

    async def settle(self, blockdev: dict[str, Any]) -> None:
        """Have everything written to an image that QEMU holds back, tables too.

        Closing an image does so as well, but says nothing when it fails.

        :param blockdev: what the image was opened with, read-only now.
        :raise ToolError: something could not be written.
        """
        await self.qmp.execute("blockdev-reopen", options=[blockdev], seconds=jobs.FLUSH_SECONDS)

    def last_words(self) -> str:
        """What it wrote to its standard error."""
        self._said.seek(0)
        return self._said.read(4096).decode(errors="replace").strip()
