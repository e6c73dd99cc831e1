"""Steps on firmware state: UEFI variables (a file) and TPM state (a folder)."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence

from snaptree.errors import NotFoundError, RefusedError, ToolError
from snaptree.images import durable, small
from snaptree.planning.domain_memory_steps import DomainGoOver
from snaptree.planning.live_steps import Kept
from snaptree.planning.memory_steps import GoOver
from snaptree.planning.steps import CopyFirmware, RemoveFirmware, Step
from snaptree.running.context import Context


def copy(step: CopyFirmware, context: Context) -> None:
    """Copy a piece of firmware state whole."""
    if not os.path.lexists(step.source):
        raise NotFoundError(
            f"there is no {step.role} state at {step.source}", "give its path with 'snaptree set --nvram' or '--tpm'"
        )
    _require_no_link(step.role, step.source, step.target)
    durable.make_folder(os.path.dirname(step.target))
    if step.replace:
        small.replace(step.source, step.target, context.token)
    else:
        small.copy(step.source, step.target, step.source, context.token)


def require_there(steps: Iterable[Step]) -> None:
    """See that the firmware state that these steps read is there, before anything is touched.

    :raise NotFoundError: a piece of it is not.
    :raise RefusedError: a symbolic link is in its place.
    """
    made: set[str] = set()
    for step in steps:
        if isinstance(step, CopyFirmware):
            _require_no_link(step.role, step.source, step.target)
            _require_state(step.role, step.source, made)
            made.add(step.target)
        elif isinstance(step, GoOver | DomainGoOver):
            for each in _loaded(step):
                _require_no_link(each.role, each.copy, each.live)
                _require_state(each.role, each.copy, made)
                _require_state(each.role, each.live, made)


def _loaded(step: GoOver | DomainGoOver) -> tuple[Kept, ...]:
    """The pieces that a QEMU which loads memory finds."""
    if isinstance(step, DomainGoOver):
        return step.pieces
    return step.load.firmware if step.load is not None else ()


def _require_state(role: str, path: str, made: Collection[str]) -> None:
    if path not in made and not os.path.exists(path):
        hint = "put it back, or forget it with 'snaptree set --nvram' or '--tpm'"
        raise NotFoundError(f"there is no {role} state at {path}", hint)


def _require_no_link(role: str, *paths: str) -> None:
    """Refuse state in whose place a symbolic link is: a copy of the link keeps nothing, and following it is no copy."""
    for path in paths:
        if os.path.islink(path):
            hint = "give the path of the state itself with 'snaptree set --nvram' or '--tpm'"
            raise RefusedError(f"{path}, where {role} state should be, is a symbolic link", hint)


def uncopy(step: CopyFirmware, context: Context) -> None:
    """Remove a copy that was made aside; one over the live state is made after the point of no return only."""
    if not step.replace:
        durable.discard_temporary(step.target, context.token)
        durable.remove_small(step.target)


# ---- of a machine that runs ---------------------------------------------------------------------------------------


def renew(copies: Iterable[Kept], context: Context) -> None:
    """Copy once more what has changed since it was copied, while the guest stands still.

    That is seldom: what is compared here was read just before, so that the guest waits for a moment only.
    """
    for each in copies:
        if not small.same(each.live, each.copy):
            small.replace(each.live, each.copy, context.token)


def changed(copies: Iterable[Kept]) -> bool:
    """Whether something has changed since it was copied."""
    return any(not small.same(each.live, each.copy) for each in copies)


def require_unchanged(copies: Iterable[Kept]) -> None:
    """See that the variables are as at the instant: of a flash QEMU saves in the background what it has by then.

    :raise ToolError: the guest has written some.
    """
    for each in copies:
        if each.role == "nvram" and not small.same(each.live, each.copy):
            message = f"the guest wrote to {each.live} while its memory was saved, so that the two do not agree"
            raise ToolError(message, "take the snapshot again")


def forget(copies: Iterable[Kept]) -> None:
    """Remove copies that nothing will refer to."""
    for each in copies:
        durable.remove_small(each.copy)


def bring(pieces: Iterable[Kept], context: Context) -> None:
    """Put copies in the place of the live state for as long as a QEMU is started that loads beside the one of now.

    What was there has a hidden name meanwhile: who has it open goes on writing to it.
    """
    for each in pieces:
        new = small.prepare(each.copy, each.live, context.token)
        context.journal.note(_before(each), str(os.lstat(each.live).st_ino))
        durable.exchange(new, each.live)


def give_names_back(pieces: Iterable[Kept], context: Context) -> None:
    """Let what was live before have its name again, and what was brought the hidden one.

    The QEMU of now opens its file anew, by name, when it is to go on although its memory has been saved (10.0.2).
    """
    for each in pieces:
        hidden = durable.temporary_path(each.live, context.token)
        if _was_live(hidden, each, context):
            durable.exchange(hidden, each.live)


def give_back(pieces: Sequence[Kept], context: Context) -> None:
    """Let all be as it was before anything was brought."""
    give_names_back(pieces, context)
    for each in pieces:
        durable.discard_temporary(each.live, context.token)


def settle(pieces: Iterable[Kept], context: Context) -> None:
    """Let what was brought have the name of what was live before, which goes: no QEMU has that open any more."""
    for each in pieces:
        hidden = durable.temporary_path(each.live, context.token)
        if _was_live(each.live, each, context) and os.path.lexists(hidden):
            durable.exchange(hidden, each.live)
        durable.discard_temporary(each.live, context.token)


def _was_live(path: str, piece: Kept, context: Context) -> bool:
    """Whether the path leads to what was live before something was brought."""
    noted = context.journal.recall(_before(piece))
    return noted is not None and os.path.lexists(path) and str(os.lstat(path).st_ino) == noted


def _before(piece: Kept) -> str:
    return f"before {piece.live}"


def remove(step: RemoveFirmware) -> None:
    """Remove a copy that nothing refers to."""
    durable.remove_small(step.path)
