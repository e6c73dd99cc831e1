"""Freezing a guest's file systems, and a process that thaws them should snaptree be killed meanwhile."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from snaptree.errors import SnaptreeError, ToolError
from snaptree.qemu import agent
from snaptree.qemu.agent import GuestAgent
from snaptree.qemu.running import RunningQemu
from snaptree.running.guard import StandBy

GUARD_SECONDS = 120.0
"""So long the guard tries to thaw: what was being frozen when snaptree was killed may still take its time."""


@asynccontextmanager
async def quiesced(qemu: RunningQemu, path: str | None) -> AsyncIterator[None]:
    """All that the guest has written is on its disks, and it writes nothing, in the block; it writes again afterwards.

    :param path: the agent's socket, if not the one that QEMU tells.
    :raise NotFoundError: there is no agent to be asked.
    :raise BusyError: somebody has frozen the file systems already.
    :raise ToolError: the agent does not do it, or has nothing to freeze; or, after the block, does not thaw.
    """
    guest = GuestAgent.connect(path or await agent.find(qemu))
    try:
        guest.require_thawed()
        guard = StandBy(
            "snaptree.running.quiescing", [guest.descriptor], [str(guest.descriptor), guest.path], "the frozen guest"
        )
        with guard:
            try:
                if not guest.freeze():
                    hint = "mount what is to be frozen, or leave out --quiesce"
                    raise ToolError("the guest agent has no file system to freeze", hint)
                yield
            finally:
                try:
                    guest.thaw()
                except BaseException:
                    # Somebody goes on trying, where there is anybody to be reached by this connection.
                    guard.left = not guest.gone
                    if guest.gone:
                        await thaw(qemu, path)
                    raise
    finally:
        guest.close()


async def thaw(qemu: RunningQemu, path: str | None) -> None:
    """Thaw the guest's file systems, if its agent is there and they are frozen."""
    with suppress(SnaptreeError):
        guest = GuestAgent.connect(path or await agent.find(qemu))
        try:
            guest.thaw()
        finally:
            guest.close()


def _serve(watched: int, channel: int, path: str) -> None:
    with socket.socket(fileno=watched) as parent:
        parent.send(b"r")
        if parent.recv(1):
            return
    with socket.socket(fileno=channel) as connection:
        GuestAgent(connection, path).thaw(GUARD_SECONDS)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
