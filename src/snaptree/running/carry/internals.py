"""Steps on internal snapshots, done by qemu-img."""

from __future__ import annotations

from typing import Any

from snaptree.errors import NotFoundError, ToolError
from snaptree.images import durable, gate, qemu_img
from snaptree.images.facts import read_facts, shows_point
from snaptree.images.holes import punch_free
from snaptree.images.qemu_img import Keys
from snaptree.planning.steps import ApplyInternal, DeleteInternal, MakeInternal
from snaptree.running.context import Context


def tags_of(path: str) -> tuple[str, ...]:
    """The tags of the internal snapshots that the image has."""
    return tuple(each.name for each in read_facts(path, "qcow2").internals)


def _node(path: str) -> dict[str, Any]:
    """The image by itself, to be written; internal snapshots are made and deleted without what is beneath."""
    return gate.blockdev(path, "qcow2", None, None, read_only=False, locking=False)


def id_of(path: str, tag: str) -> str:
    """The id of the internal snapshot of that name: where QEMU goes back to one, it takes ids before names.

    :raise NotFoundError: there is none.
    """
    for each in read_facts(path, "qcow2").internals:
        if each.name == tag:
            return each.id
    raise NotFoundError(f"{path} has no internal snapshot {tag!r}", "see 'snaptree verify'")


def mend(path: str, keys: Keys) -> bool:
    """Put right the reference counts that a killed or failed program of QEMU's has left between.

    The tables are the truth, and are not changed but for the flags that repeat what the counts say. QEMU 10.0.2 empties
    the table of internal snapshots when it repairs an image that has autoclear bits (a bitmap, say): what is lost there
    is room, and it stays lost.

    :return: whether the counts are right now.
    """
    facts = read_facts(path, "qcow2")
    if facts.internals and (facts.bitmaps or facts.autoclear):
        return False
    return qemu_img.check(_node(path), repair="all", keys=keys).errors == 0


def require(done: bool, what: str, path: str) -> None:
    """See that a program which says that it has done something has done it: what comes next rests on that.

    :raise ToolError: it has not.
    """
    if not done:
        raise ToolError(f"qemu-img reported success, but {path} {what}", "is it QEMU's program of that name?")


def make(step: MakeInternal, context: Context) -> None:
    """Take an internal snapshot."""
    with context.holding.lent([step.path]):
        qemu_img.snapshot_create(_node(step.path), step.tag, context.keys)
    require(step.tag in tags_of(step.path), f"has no internal snapshot {step.tag!r}", step.path)
    durable.sync_file(step.path)


def unmake(step: MakeInternal, context: Context) -> None:
    """Take an internal snapshot back; whether it was taken, half taken or not at all."""
    with context.holding.lent([step.path]):
        mend(step.path, context.keys)
        if step.tag in tags_of(step.path):
            qemu_img.snapshot_delete(_node(step.path), step.tag, context.keys)
            require(step.tag not in tags_of(step.path), f"still has the internal snapshot {step.tag!r}", step.path)


def apply(step: ApplyInternal, context: Context) -> None:
    """Make the active state what an internal snapshot shows."""
    files = [step.path, *(path for path, _ in step.below)]
    with context.holding.lent(files):
        if context.recovering:
            mend(step.path, context.keys)
        graph = gate.graph([(step.path, "qcow2"), *step.below], read_only=False, locking=False)
        go_back(graph, step.path, step.tag, context.keys)
        if context.recovering:
            mend(step.path, context.keys)
    durable.sync_file(step.path)


def go_back(graph: dict[str, Any], path: str, tag: str, keys: Keys) -> None:
    """Make the active state of an image, opened by the graph, what an internal snapshot shows."""
    qemu_img.snapshot_apply(graph, id_of(path, tag), keys)
    require(shows_point(path, tag), f"does not show what {tag!r} shows", path)


def delete(step: DeleteInternal, context: Context) -> None:
    """Delete an internal snapshot."""
    with context.holding.lent([step.path]):
        if context.recovering:
            mend(step.path, context.keys)
        if step.tag in tags_of(step.path):
            qemu_img.snapshot_delete(_node(step.path), step.tag, context.keys)
            require(step.tag not in tags_of(step.path), f"still has the internal snapshot {step.tag!r}", step.path)
    durable.sync_file(step.path)
    punch_free(step.path)
