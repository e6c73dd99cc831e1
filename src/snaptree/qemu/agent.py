"""The guest agent (qemu-ga) of a running machine: found, asked, and told to freeze and thaw the guest's file systems.

Its channel has no beginning: what somebody asked before may still be in it. Hence each command begins with
``guest-sync-delimited``, whose answer starts with a byte that no answer has in it, and with which whatever came
before is thrown away. Every wait has a deadline: in a guest that hangs, or has no agent, nobody ever answers.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from typing import Any

from snaptree.errors import BusyError, NotFoundError, SnaptreeError, ToolError
from snaptree.qemu.dialling import dial
from snaptree.qemu.running import RunningQemu
from snaptree.qemu.session import properties, sense

CHANNEL = "org.qemu.guest_agent.0"
"""The name that a guest's agent looks for among its serial ports."""
ANSWER_SECONDS = 5.0
"""So long the agent may take to answer that it is there."""
FREEZE_SECONDS = 30.0
"""So long freezing may take: all that the guest has not yet written is written first."""
THAW_SECONDS = 30.0
LONGEST = 1 << 20
"""No answer is longer, in bytes."""
_SENTINEL = b"\xff"


async def find(qemu: RunningQemu) -> str:
    """The socket of the machine's agent channel, as its QEMU tells.

    :raise NotFoundError: it has none, or none that leads to a socket of a file's name.
    :raise ToolError: nobody listens in the guest.
    """
    label = None
    for place in ("/machine/peripheral", "/machine/peripheral-anon"):
        for child, kind in await properties(qemu.qmp, place):
            if kind != "child<virtserialport>":
                continue
            path = f"{place}/{child}"
            if await qemu.qmp.execute("qom-get", path=path, property="name") == CHANNEL:
                label = await qemu.qmp.execute("qom-get", path=path, property="chardev")
    hint = f"give QEMU a virtserialport with name={CHANNEL} on a -chardev socket,…,server=on,wait=off"
    if not isinstance(label, str):
        raise NotFoundError(f"{qemu.qmp.name} has no channel for a guest agent", hint)
    told = await qemu.qmp.execute("query-chardev")
    with sense(qemu.qmp.name, "channels", told):
        (found,) = [each for each in told if each["label"] == label]
        name, listens = str(found["filename"]), bool(found["frontend-open"])
    name = name.removeprefix("disconnected:")
    if not name.startswith("unix:") or ",server" not in name:
        hint = "let the channel be a -chardev socket,path=…,server=on,wait=off, or name its socket with --agent"
        raise NotFoundError(f"the guest agent's channel is {name}, to which nobody can connect", hint)
    if not listens:
        hint = "start qemu-guest-agent in the guest, or leave out --quiesce"
        raise ToolError("no agent listens in the guest: its port is not open", hint)
    return os.path.join(qemu.folder(), name.removeprefix("unix:").rpartition(",server")[0])


class GuestAgent:
    """The agent at the other end of a connection, which it serves alone. One question at a time."""

    def __init__(self, connection: socket.socket, path: str) -> None:
        self._connection = connection
        self.path = path
        self.gone = False
        """Whether nobody is at the other end any more."""
        self._said = b""

    @classmethod
    def connect(cls, path: str) -> GuestAgent:
        """Connect, and see that somebody answers.

        :raise NotFoundError: nobody listens on the socket.
        :raise ToolError: nobody answers, or with nonsense.
        """
        found = dial(path)
        if found is None:
            raise NotFoundError(f"nothing listens at {path}, the guest agent's socket", "does the machine run?")
        agent = cls(found, path)
        try:
            agent.sync(ANSWER_SECONDS)
        except BaseException:
            agent.close()
            raise
        return agent

    @property
    def descriptor(self) -> int:
        """The connection, for a process that shares it."""
        return self._connection.fileno()

    def close(self) -> None:
        """Give the channel back."""
        self._connection.close()

    def sync(self, seconds: float) -> None:
        """Wait until the agent answers to just this, and throw away what came before.

        :raise ToolError: it does not, in that time.
        """
        self._catch_up(time.monotonic() + seconds)

    def _catch_up(self, until: float, *more: bytes) -> None:
        """The same, with commands that the agent finds right behind it."""
        number = secrets.randbelow(1 << 31)
        self._said = b""
        # The first byte makes the agent forget half a command that somebody has left in the channel.
        self._send(_SENTINEL + _command("guest-sync-delimited", {"id": number}) + b"".join(more), until)
        while True:
            line = self._line(until)
            if _SENTINEL in line and _answer(line.rpartition(_SENTINEL)[2]) == {"return": number}:
                return

    def execute(self, command: str, seconds: float, *, ahead: bool = False) -> Any:
        """Carry out one command.

        :param ahead: leave the command to an agent that is still at something else, and so does not answer: it is
            carried out next, whether we hear of it or not.
        :raise ToolError: it was refused, or is not answered in that time, or with nonsense.
        """
        until = time.monotonic() + seconds
        if ahead:
            self._catch_up(until, _command(command, {}))
        else:
            self.sync(min(seconds, ANSWER_SECONDS))
            self._send(_command(command, {}), until)
        line = self._line(until)
        answer = _answer(line)
        if answer is None or ("return" in answer) == ("error" in answer):
            raise ToolError(f"the guest agent's answer to {command} makes no sense: {line[:100]!r}")
        if "error" in answer:
            error = answer["error"]
            said = error.get("desc") if isinstance(error, dict) else error
            raise ToolError(f"the guest agent refused {command}: {str(said)[:200]}", "see to the agent in the guest")
        return answer["return"]

    def _send(self, words: bytes, until: float) -> None:
        try:
            self._connection.settimeout(max(0.01, until - time.monotonic()))
            self._connection.sendall(words)
        except TimeoutError as error:
            raise self._silent() from error
        except OSError as error:
            raise self._went_away(error.strerror) from error

    def _line(self, until: float) -> bytes:
        while b"\n" not in self._said:
            try:
                self._connection.settimeout(max(0.01, until - time.monotonic()))
                data = self._connection.recv(65536)
            except TimeoutError as error:
                raise self._silent() from error
            except OSError as error:
                raise self._went_away(error.strerror) from error
            if not data:
                raise self._went_away()
            self._said += data
            if len(self._said) > LONGEST:
                raise ToolError(f"the guest agent at {self.path} says something without end", "is it qemu-ga?")
            if time.monotonic() > until:
                raise self._silent()
        line, _, self._said = self._said.partition(b"\n")
        return line

    def _silent(self) -> ToolError:
        hint = "is qemu-guest-agent running in the guest, and no other program connected to its socket?"
        return ToolError(f"the guest agent at {self.path} does not answer", hint)

    def _went_away(self, why: str | None = None) -> ToolError:
        self.gone = True
        said = f"the guest agent at {self.path} went away"
        return ToolError(f"{said}: {why}") if why else ToolError(said, "has the machine ended?")

    # ---- file systems ---------------------------------------------------------------------------------------------

    def require_thawed(self) -> None:
        """See that nobody has frozen the guest's file systems.

        :raise BusyError: somebody has.
        """
        if self.execute("guest-fsfreeze-status", ANSWER_SECONDS) != "thawed":
            raise BusyError("the guest's file systems are frozen already", "wait for whoever did it, or thaw them")

    def freeze(self) -> int:
        """Have all that the guest has not yet written on its disks, and let it write nothing; how many file systems.

        Whatever comes of it, :meth:`thaw` is to be called.

        :raise ToolError: it cannot, or not in time.
        """
        count = self.execute("guest-fsfreeze-freeze", FREEZE_SECONDS)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ToolError(f"the guest agent says that it has frozen {str(count)[:40]!r} file systems")
        return count

    def thaw(self, seconds: float | None = None) -> None:
        """Let the guest write again; tried until it does. One that is only just being frozen is thawed when it is.

        :raise ToolError: it cannot be reached for so long, or has gone away.
        """
        until = time.monotonic() + (THAW_SECONDS if seconds is None else seconds)
        while True:
            try:
                left = max(0.1, until - time.monotonic())
                with suppress(ToolError):
                    # It refuses where nothing is frozen.
                    self.execute("guest-fsfreeze-thaw", left, ahead=True)
                if self.execute("guest-fsfreeze-status", max(0.1, until - time.monotonic())) == "thawed":
                    return
            except SnaptreeError:
                if self.gone or time.monotonic() > until:
                    raise
            if time.monotonic() > until:
                hint = "run 'guest-fsfreeze-thaw' by other means, or 'fsfreeze -u' in the guest"
                raise ToolError(f"the guest agent at {self.path} does not thaw the guest's file systems", hint)
            time.sleep(0.05)


def _command(name: str, arguments: dict[str, Any]) -> bytes:
    said: dict[str, Any] = {"execute": name}
    return json.dumps(said | ({"arguments": arguments} if arguments else {})).encode() + b"\n"


def _answer(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.strip(_SENTINEL))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
