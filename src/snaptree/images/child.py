"""Programs of QEMU's end when the process that started them does, so that none works on without its journal.

They are started with ``close_fds=False``: what they inherit is what was made inheritable, the locks on their images.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
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
