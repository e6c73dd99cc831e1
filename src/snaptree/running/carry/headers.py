"""The step that writes another backing name into a header."""

from __future__ import annotations

from snaptree.images import durable, gate, header_write
from snaptree.planning.steps import Repoint
from snaptree.running.context import Context


def repoint_file(path: str, name: str | None, image_format: str | None) -> None:
    """Write another backing name into a new file, which is synced before it gets its name: a crash throws it away."""
    with durable.opened_for_writing(path) as descriptor:
        writes = header_write.repoint_writes(descriptor, path, name, image_format)
        for offset, data in writes.ordered() if writes is not None else ():
            durable.write_in_place(descriptor, offset, data, path)


def repoint(step: Repoint, context: Context) -> None:
    """Write another backing name, so that a crash leaves the old or the new one.

    Where the header has to be rearranged for it, the new header is first kept in the journal: a write that a power cut
    tears is then written again.
    """
    name = gate.relative_backing_name(step.path, step.backing) if step.backing is not None else None
    kept = context.journal.noted(step.path) if context.recovering else None
    with durable.opened_for_writing(step.path) as descriptor:
        if kept is not None:
            durable.write_in_place(descriptor, 0, bytes.fromhex(kept), step.path)
            durable.sync(descriptor, step.path)
            return
        writes = header_write.repoint_writes(descriptor, step.path, name, step.backing_format)
        if writes is None:
            # By a process, perhaps, that was killed before it had synced it.
            durable.sync(descriptor, step.path)
            return
        if not writes.atomic:
            context.journal.note(step.path, writes.redo.hex())
        for offset, data in writes.ordered():
            durable.write_in_place(descriptor, offset, data, step.path)
            durable.sync(descriptor, step.path)
