"""What can go wrong, as classes.

Every error that snaptree raises on purpose is a :class:`SnaptreeError`. A class has a stable ``code`` (for scripts and
``--json``), an exit ``status`` of the command line, and each error carries a message that says what happened and to
which file, and a ``hint`` that says what to do next.

::

    SnaptreeError
    ├── UsageError          2  the request itself makes no sense
    ├── NotFoundError       3  no such machine, snapshot, branch or disk
    ├── ExistsError         4  the name or the file is taken
    ├── BusyError           5  somebody else works on it, or has an image open
    ├── RefusedError        6  possible to ask for, wrong to do: something that is kept would change
    ├── UnhealthyError      7  an image or a chain is not what it should be
    ├── NoSpaceError        8  it would not fit, or the file system filled up
    ├── IoError             9  reading, writing or syncing failed
    ├── FindingsError      10  ``verify`` found something wrong
    ├── CancelledError    130  stopped on request; what is kept is whole
    ├── StateError         11  snaptree's own state cannot be read or written
    └── ToolError          12  QEMU's programs are missing, failed, or gave an unexpected answer
"""

from __future__ import annotations

from typing import ClassVar


class SnaptreeError(Exception):
    """The root of all errors that snaptree raises on purpose.

    :param message: what happened and to which file, a whole sentence without a full stop.
    :param hint: what the user can do next; empty when there is nothing to say.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SnaptreeError):
    """The request itself makes no sense: options that exclude each other, a bad name, a bad number."""

    code = "usage"
    status = 2


class NotFoundError(SnaptreeError):
    """There is no machine, snapshot, branch, disk or file of that name."""

    code = "not-found"
    status = 3


class ExistsError(SnaptreeError):
    """The name or the file is taken already."""

    code = "exists"
    status = 4


class BusyError(SnaptreeError):
    """Another operation works on the machine, or another process has one of its images open."""

    code = "busy"
    status = 5


class RefusedError(SnaptreeError):
    """It could be done, but something that is kept would change or be lost."""

    code = "refused"
    status = 6


class NoKeyError(RefusedError):
    """An image is encrypted, and its key is not known or does not open it."""


class UnhealthyError(SnaptreeError):
    """An image file or a chain of them is missing, damaged, changed from outside, or not what it says it is."""

    code = "unhealthy"
    status = 7


class NoSpaceError(SnaptreeError):
    """The operation would not fit on a file system, or the file system filled up while it ran."""

    code = "no-space"
    status = 8


class IoError(SnaptreeError):
    """Reading, writing, syncing or renaming a file failed."""

    code = "io"
    status = 9


class FindingsError(SnaptreeError):
    """``verify`` found that files and tree disagree."""

    code = "findings"
    status = 10


class StateError(SnaptreeError):
    """snaptree's own state folder cannot be read or written, or was written by a newer version."""

    code = "state"
    status = 11


class ToolError(SnaptreeError):
    """One of QEMU's programs is missing, failed, or answered something unexpected."""

    code = "tool"
    status = 12


class AttentionError(SnaptreeError):
    """`verify` found all that is kept whole, but something to see to, such as a file that nothing needs."""

    code = "attention"
    status = 13


class OutrunError(ToolError):
    """A guest writes faster than its disk is merged, so that the merge does not come to its end."""


class CancelledError(SnaptreeError):
    """The operation was stopped on request; everything that is kept is whole."""

    code = "cancelled"
    status = 130


def every_error_class() -> tuple[type[SnaptreeError], ...]:
    """All error classes, the root first; the command-line reference is made from it."""
    return (SnaptreeError, *sorted(SnaptreeError.__subclasses__(), key=lambda cls: cls.status))
