"""A sample of the crash matrix by ``strace``, which cannot be fooled: the kernel's own system calls are counted.

The library of ``tests/kit/faults.c`` sees calls through the C library only; here the n-th ``fsync`` (and so on) of
snaptree or of a program of QEMU's kills the process that makes it, however it makes it.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess

from tests.crash.cases import CASES
from tests.crash.matrix import NOT_HERE, WAYS, Matrix, NotHereError, Tally, Way, staged, tell

from snaptree.planning.verbs import Request

WAY = "kill by strace"
WAYS[WAY] = Way()
CALLS = (
    *("fsync", "fdatasync", "pwrite64", "write", "ftruncate", "fallocate", "fchmod"),
    *("openat", "mkdir", "link", "rename", "renameat2", "unlink", "unlinkat"),
    *("ioctl", "copy_file_range", "fchown", "fsetxattr"),
)
TIMES = (1, 2, 3, 5, 8, 13, 21, 34, 55)


class Traced(Matrix):
    """The matrix, with the points counted by strace."""

    call = ""

    def interrupted(self, number: int, request: Request) -> bool:
        """Kill what makes the system call for the n-th time; whether it came to that."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(self.attempt(1 << 40, request))
        os.close(reading)
        words = [f"inject={self.call}:signal=SIGKILL:when={number}", "-e", f"trace={self.call}", "-e", "signal=none"]
        log = self.folder / "trace"
        tracer = subprocess.Popen(
            ["strace", "-f", "-o", log, "-p", str(child), "-e", *words], stderr=subprocess.PIPE, text=True
        )
        assert tracer.stderr is not None
        attached = tracer.stderr.readline()
        assert "attached" in attached, attached
        os.write(writing, b".")
        os.close(writing)
        status = os.waitpid(child, 0)[1]
        tracer.communicate(timeout=60)
        # A call in which the process was killed has no result.
        killed = "= ?" in log.read_text()
        if not killed and status:
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == NOT_HERE, f"ended with {status}"
            raise NotHereError
        return killed


def sample(case: str, seed: int, stride: int) -> Tally:
    """One case: each of the calls at some of its times."""
    with staged(case) as (folder, place):
        matrix = Traced(folder, case, WAY, place)
        chance = random.Random(f"{case} {seed}")
        for call in CALLS:
            matrix.call = call
            for number in TIMES:
                if chance.randrange(stride) == 0 and not matrix.point(number):
                    break
        return matrix.tally


def main() -> None:
    """Run what the arguments name and print a line of JSON for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exactly", action="append", default=[], help="this very case; all without it")
    parser.add_argument("--way", action="append", default=[], choices=[WAY])
    parser.add_argument("--stride", type=int, default=1, help="one point in so many")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for case in options.exactly or CASES:
        tell(sample(case, options.seed, options.stride))


if __name__ == "__main__":
    main()
