"""Steps that merge by sharing blocks: build the merged file aside, then put it in place by one rename."""

from __future__ import annotations

import os

from snaptree.errors import BusyError, IoError, RefusedError
from snaptree.images import durable, gate
from snaptree.images.facts import open_to_read
from snaptree.images.inode import inode_of, is_still
from snaptree.images.locks import who_has_open
from snaptree.images.mover import sharing
from snaptree.images.mover.merging import Merge, merge
from snaptree.images.rights import alike, copy_notes
from snaptree.planning.steps import BuildMerged, PutInPlace
from snaptree.running.carry.headers import repoint_file
from snaptree.running.carry.moving import Tally, note_sources, require_counted
from snaptree.running.context import Context
from snaptree.running.journal import Journal


def build(step: BuildMerged, context: Context) -> None:
    """Build the merged file under a hidden name, whole and on disk."""
    if context.recovering:
        unbuild(step, context)
    temporary = durable.prepare_file(step.path, step.path, context.token, (), 0)
    context.journal.claim(step.path, *inode_of(temporary))
    if not alike(temporary, step.path):
        hint = "use sudo, or merge with --merge commit or --merge pull"
        raise RefusedError(f"not allowed to give a new file the owner, group and mode of {step.path}", hint)
    _copy(step.path, temporary)
    image_format = step.row[step.into][1]
    # It may be a copy of late reference counts; the copy is ours alone.
    require_counted(temporary, image_format, context.keys)
    work = Merge(step.row, step.below, step.into, copy=temporary, share=True)
    tally = Tally(context, step.shared + step.bytes)
    context.journal.moved += merge(work, tally.watch(step.path))
    if step.into != 0:
        below = step.below[0] if step.below else None
        name = gate.relative_backing_name(step.path, below[0]) if below else None
        repoint_file(temporary, name, below[1] if below else None)
    durable.sync_file(temporary)
    # Its name, too: whether it has taken the other's place is told from which of the two is there.
    durable.sync_folder(temporary)
    _require_replaceable(step, context.qemu.pid if context.qemu is not None else 0)
    note_sources(step, context)


def _copy(path: str, temporary: str) -> None:
    source = open_to_read(path)
    try:
        with durable.opened_for_writing(temporary) as target:
            sharing.keep_flags(source, target)
            copy_notes(source, target)
            sharing.share_whole(source, target, path)
    finally:
        os.close(source)


def _require_replaceable(step: BuildMerged, qemu: int) -> None:
    """Refuse to put another file in the place of one that is known elsewhere by its inode.

    :param qemu: the process of the machine's own QEMU, which goes over to what was built.

    :raise RefusedError: it has other names.
    :raise BusyError: another process has it open.
    """
    path = step.path
    with durable.explained(path, "look at"):
        links = os.lstat(path).st_nlink
    if links > 1:
        raise RefusedError(f"{path} has {links} names (hard links)", "the others would go on naming the old file")
    who = who_has_open((path,), qemu, step.guest).get(path)
    if who:
        raise BusyError(f"{path} is open by {', '.join(who)}", "stop the program that uses it, then try again")


def is_ready(step: PutInPlace, journal: Journal) -> bool:
    """Whether what was built is there, under its hidden name or in place already."""
    if os.path.lexists(durable.temporary_path(step.path, journal.token)):
        return True
    return any(is_still(step.path, made.generation, made.inode) for made in journal.claims(step.path))


def put_in_place(step: PutInPlace, context: Context) -> None:
    """Put what was built in place; what is in place already stays."""
    temporary = durable.temporary_path(step.path, context.token)
    if os.path.lexists(temporary):
        # Nobody may come upon it unlocked: it has the name that others know in the next moment.
        context.lock.extend([temporary])
        if not step.live or context.qemu is None:
            # Otherwise QEMU reads it already, and has it locked.
            context.holding.take_new(temporary)
        durable.replace(temporary, step.path)
    elif is_ready(step, context.journal):
        # By a process, perhaps, that was killed before it had synced it.
        durable.sync_folder(step.path)
    else:
        raise IoError(
            f"{temporary}, which was to take the place of {step.path}, is gone",
            "nothing is lost, since its sources are there; was it removed by hand?",
        )


def unbuild(step: BuildMerged, context: Context) -> None:
    """Remove what was built aside, whole or not."""
    durable.discard_temporary(step.path, context.token)
    for made in context.journal.claims(step.path):
        context.journal.unclaim(made)
