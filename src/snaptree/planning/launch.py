"""The command that starts a machine, as a user stores it."""

from __future__ import annotations

import shlex

from snaptree.errors import UsageError

_FORBIDDEN = {
    "-daemonize": "snaptree starts QEMU in the background itself",
    "--daemonize": "snaptree starts QEMU in the background itself",
}


def split_command(command: str) -> list[str]:
    """The words of a stored command.

    :raise UsageError: its quotes do not match, it is empty, or it has something in it that snaptree does itself.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"the start command cannot be read: {error}", "see to its quotes") from error
    if not words:
        raise UsageError("the start command is empty", "give QEMU's command line, without disks and monitor")
    for word in words:
        if word in _FORBIDDEN:
            raise UsageError(f"the start command has {word}: {_FORBIDDEN[word]}", "leave it out")
    return words


def checked_command(command: str) -> str:
    """A command that can be stored.

    :raise UsageError: it cannot be read, or does what snaptree does itself.
    """
    split_command(command)
    return command
