"""Programs of QEMU's: run to their end, watched, and never left behind.

They end when the process that started them does, so that none works on without its journal. They are started with
``close_fds=False``: what they inherit is what was made inheritable, the locks on their images.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO

from msgspec import Struct

from snaptree.errors import CancelledError, ToolError
from snaptree.images.mover.limiting import Limiter

STALL_SECONDS = 300.0
"""So long a program may neither read, write nor compute before it is killed."""
KILL_SECONDS = 10.0
"""So long a program may take to go when it was killed; longer when the system holds it, on a disk that hangs."""
MOST_OUTPUT = 16 << 20
"""No program of QEMU's has more to answer than so many bytes. It may complain without limit: qemu-img check has a line
for each leaked cluster."""
KEPT_COMPLAINTS = 64 << 10
"""So much is kept of the beginning of what it complains, and as much of the end."""

_PR_SET_PDEATHSIG = 1
_POLL = 0.1
_libc = ctypes.CDLL(None, use_errno=True)


def ends_with_us() -> Callable[[], None]:
    """What a new process calls before it becomes the program (``preexec_fn``)."""
    parent = os.getpid()

    def promise() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # The parent was killed between the fork and the promise: nobody will send the signal.
            os._exit(1)

    return promise


def find_tool(name: str) -> str:
    """The path of one of QEMU's programs.

    :raise ToolError: it is not installed.
    """
    import shutil

    found = shutil.which(name)
    if found is None:
        raise ToolError(f"{name} is not installed", "install QEMU's tools (qemu-utils on Debian and Ubuntu)")
    return found


def kill(process: subprocess.Popen[bytes], name: str) -> None:
    """Kill a program and wait until it has gone.

    :raise ToolError: the system holds it.
    """
    process.kill()
    try:
        process.wait(KILL_SECONDS)
    except subprocess.TimeoutExpired as error:
        hint = "look at the kernel's log for the device; the images stay locked until it has gone"
        raise ToolError(f"{name} cannot be killed: the system does not let go of it", hint) from error


class Ended(Struct, frozen=True):
    """How a program ended, and what it printed."""

    status: int
    out: str
    err: str


def run_program(
    words: Sequence[str],
    commands: str = "",
    *,
    told: Callable[[bytes], None] = lambda data: None,
    complained: Callable[[bytes], None] = lambda data: None,
    cancelled: Callable[[], bool] = lambda: False,
    limiter: Limiter | None = None,
) -> Ended:
    """Run one of QEMU's programs to its end; it reads the commands and then the end of its input.

    :param told: is given what it prints, as it comes.
    :param complained: is given what it complains, as it comes.
    :param limiter: while it is held the program is kept from running (SIGSTOP).
    :raise CancelledError: ``cancelled`` said so.
    :raise ToolError: it is not installed, stands still, or prints without end.
    """
    with open(os.memfd_create("commands"), "w+b") as reading:
        reading.write(commands.encode())
        reading.seek(0)
        process = subprocess.Popen(
            [find_tool(words[0]), *words[1:]],
            stdin=reading,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=ends_with_us(),
            close_fds=False,
        )
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        try:
            watch = _Watch(process, words[0], told, complained, cancelled, limiter or Limiter())
            out, err = watch.follow()
        except BaseException:
            kill(process, words[0])
            raise
    return Ended(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


class _Watch:
    """Reads what a program prints, and sees whether it gets on."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        name: str,
        told: Callable[[bytes], None],
        complained: Callable[[bytes], None],
        cancelled: Callable[[], bool],
        limiter: Limiter,
    ) -> None:
        self._process, self._name, self._limiter = process, name, limiter
        self._told, self._complained, self._cancelled = told, complained, cancelled
        self._stopped = False
        self._work = -1
        self._since = time.monotonic()

    def follow(self) -> tuple[bytes, bytes]:
        assert self._process.stdout is not None and self._process.stderr is not None
        said: dict[IO[bytes], bytearray] = {self._process.stdout: bytearray(), self._process.stderr: bytearray()}
        with selectors.DefaultSelector() as selector:
            for pipe in said:
                selector.register(pipe, selectors.EVENT_READ)
            # What it has started itself may keep the pipes open after its end.
            while selector.get_map() and self._process.poll() is None:
                self._read(selector, said, _POLL)
                if self._cancelled():
                    raise CancelledError(f"stopped while {self._name} was at work")
                self._keep_still()
                self._require_work()
            while selector.get_map() and self._read(selector, said, 0.0):
                pass
        while self._process.poll() is None:
            if self._cancelled():
                raise CancelledError(f"stopped while {self._name} was at work")
            self._keep_still()
            self._require_work()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL)
        return bytes(said[self._process.stdout]), bytes(said[self._process.stderr])

    def _read(self, selector: selectors.BaseSelector, said: dict[IO[bytes], bytearray], seconds: float) -> bool:
        """Take what has been printed; whether there was anything."""
        ready = selector.select(seconds)
        for key, _ in ready:
            pipe = key.fileobj
            data = os.read(key.fd, 65536)
            assert not isinstance(pipe, int)
            if not data:
                selector.unregister(pipe)
                continue
            into = next(text for each, text in said.items() if each is pipe)
            into += data
            if pipe is not self._process.stdout:
                del into[KEPT_COMPLAINTS:-KEPT_COMPLAINTS]
                self._complained(data)
                continue
            if len(into) > MOST_OUTPUT:
                raise ToolError(f"{self._name} prints without end", "is it QEMU's program of that name?")
            self._told(data)
        return bool(ready)

    def _keep_still(self) -> None:
        """Let the program stand still while its work is held, and no longer."""
        if self._limiter.held == self._stopped:
            return
        self._stopped = not self._stopped
        # It is not waited for yet: its number is its own.
        self._process.send_signal(signal.SIGSTOP if self._stopped else signal.SIGCONT)
        (self._limiter.begin_rest if self._stopped else self._limiter.end_rest)()

    def _require_work(self) -> None:
        now = time.monotonic()
        work = _work_of(self._process.pid)
        if work != self._work or self._stopped:
            self._work, self._since = work, now
        elif now - self._since > STALL_SECONDS:
            raise ToolError(
                f"{self._name} stood still for {STALL_SECONDS:.0f} s and was killed",
                "look at the kernel's log for the device",
            )


def _work_of(process: int) -> int:
    """A number that grows while a program reads, writes or computes."""
    found = 0
    with suppress(OSError, ValueError, IndexError):
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        found += int(fields[11]) + int(fields[12])
        with open(f"/proc/{process}/io", "rb") as file:
            found += sum(int(line.split()[1]) for line in file)
    return found
