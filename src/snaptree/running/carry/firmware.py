"""Steps on firmware state: UEFI variables (a file) and TPM state (a folder)."""

from __future__ import annotations

import os

from snaptree.errors import NotFoundError, RefusedError
from snaptree.images import durable
from snaptree.planning.steps import CopyFirmware, RemoveFirmware
from snaptree.running.context import Context


def copy(step: CopyFirmware, context: Context) -> None:
    """Copy a piece of firmware state whole."""
    if not os.path.lexists(step.source):
        raise NotFoundError(
            f"there is no {step.role} state at {step.source}", "give its path with 'snaptree set --nvram' or '--tpm'"
        )
    require_no_link(step)
    durable.make_folder(os.path.dirname(step.target))
    if step.replace:
        durable.replace_small(step.source, step.target, context.token)
    else:
        durable.copy_small(step.source, step.target, step.source, context.token)


def require_no_link(step: CopyFirmware) -> None:
    """Refuse state in whose place a symbolic link is: a copy of the link keeps nothing, and following it is no copy.

    :raise RefusedError: there is one.
    """
    for path in (step.source, step.target):
        if os.path.islink(path):
            hint = "give the path of the state itself with 'snaptree set --nvram' or '--tpm'"
            raise RefusedError(f"{path}, where {step.role} state should be, is a symbolic link", hint)


def uncopy(step: CopyFirmware, context: Context) -> None:
    """Remove a copy that was made aside; one over the live state is made after the point of no return only."""
    if not step.replace:
        durable.discard_temporary(step.target, context.token)
        durable.remove_small(step.target)


def remove(step: RemoveFirmware) -> None:
    """Remove a copy that nothing refers to."""
    durable.remove_small(step.path)
