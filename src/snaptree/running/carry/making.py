"""Steps that make, replace and remove image files."""

from __future__ import annotations

import os

from snaptree.images import durable, gate, layout, qemu_img
from snaptree.images.facts import read_facts
from snaptree.images.inode import inode_of
from snaptree.images.measure import holds
from snaptree.images.mover.merging import Merge, merge
from snaptree.images.rights import copy_notes
from snaptree.planning.steps import BuildFromPoint, MakeOverlay, TakeName, Unlink
from snaptree.running.carry.headers import repoint_file
from snaptree.running.carry.internals import go_back, id_of, require
from snaptree.running.carry.moving import Tally
from snaptree.running.context import Context
from snaptree.store.operations import Claim


def _claimer(path: str, context: Context) -> durable.Claim:
    def claim(_temporary: str, generation: int, inode: int) -> None:
        context.journal.claim(path, generation, inode)

    return claim


def make_overlay(step: MakeOverlay, context: Context) -> None:
    """Make an empty overlay; it has its name only once it is whole and on disk."""
    writes, length = layout.empty_overlay(
        step.virtual_size,
        luks=gate.luks_header_at(step.luks) if step.luks else None,
        cluster_bits=step.cluster_size.bit_length() - 1,
        refcount_bits=step.refcount_bits,
        backing_name=gate.relative_backing_name(step.path, step.backing),
        backing_format=step.backing_format,
        lazy_refcounts=step.lazy_refcounts,
        extended_l2=step.extended_l2,
        compression=step.compression,
    )
    durable.make_file(step.path, writes, length, step.like, _claimer(step.path, context), context.token)


def build_from_point(step: BuildFromPoint, context: Context) -> None:
    """Make a new layer out of an internal snapshot."""
    if not step.by_qemu:
        temporary = _brought(step, context)
    elif read_facts(step.source, "qcow2").virtual_size == step.virtual_size:
        temporary = _converted(step, context)
    else:
        # QEMU reads an internal snapshot at the size that the disk has now: go back to it in a copy.
        temporary = _gone_back(step, context)
    durable.publish(temporary, step.path)


def _empty(step: BuildFromPoint, context: Context) -> str:
    """An empty overlay on the same backing file; its temporary path."""
    backing = step.below[0] if step.below else None
    writes, length = layout.empty_overlay(
        step.virtual_size,
        luks=gate.luks_header_at(step.luks) if step.luks else None,
        cluster_bits=step.cluster_size.bit_length() - 1,
        backing_name=gate.relative_backing_name(step.path, backing[0]) if backing else None,
        backing_format=backing[1] if backing else None,
    )
    temporary = durable.prepare_file(step.path, step.source, context.token, writes, length)
    _claimer(step.path, context)(temporary, *inode_of(temporary))
    return temporary


def _brought(step: BuildFromPoint, context: Context) -> str:
    """A new layer into which the mover brings the point's own data, by copying or by sharing blocks."""
    temporary = _empty(step, context)
    row = ((step.source, "qcow2"), (temporary, "qcow2"))
    work = Merge(row, step.below, 1, copy=temporary, share=step.shared > 0, tag=step.tag)
    tally = Tally(context, step.bytes + step.shared)
    context.journal.moved += merge(work, tally.watch(step.path))
    return temporary


def _converted(step: BuildFromPoint, context: Context) -> str:
    """An empty overlay on the same backing file into which QEMU copies the point's own data; its temporary path."""
    temporary = _empty(step, context)
    with context.holding.lent([step.source, *(path for path, _ in step.below)]):
        qemu_img.convert_point(
            gate.graph([(step.source, "qcow2"), *step.below], locking=False),
            (id_of(step.source, step.tag), step.tag),
            gate.graph([(temporary, "qcow2"), *step.below], read_only=False, locking=False),
            keys=context.keys,
            progress=lambda done: context.moved(int(done * step.bytes), step.bytes),
            cancelled=context.cancelled.is_set,
            limiter=context.limiter,
        )
    copied = holds((temporary, "qcow2"), [(step.source, "qcow2")], tag=step.tag)
    require(copied, f"has not all that {step.tag!r} has", temporary)
    context.journal.moved += step.bytes
    return temporary


def _gone_back(step: BuildFromPoint, context: Context) -> str:
    """A copy of the whole source in which the point is the active state, and the only one; its temporary path."""
    tags = [each.name for each in read_facts(step.source, "qcow2").internals]
    temporary = durable.prepare_file(step.path, step.source, context.token, (), 0)
    _claimer(step.path, context)(temporary, *inode_of(temporary))
    durable.copy_into(step.source, temporary, cancelled=context.stopped)
    if step.below:
        name = gate.relative_backing_name(step.path, step.below[0][0])
        repoint_file(temporary, name, step.below[0][1])
    with context.holding.lent([path for path, _ in step.below]):
        graph = gate.graph([(temporary, "qcow2"), *step.below], read_only=False, locking=False)
        go_back(graph, temporary, step.tag, context.keys)
        for tag in tags:
            qemu_img.snapshot_delete(graph, tag, context.keys)
    require(not read_facts(temporary, "qcow2").internals, "still has internal snapshots", temporary)
    context.journal.moved += step.bytes
    return temporary


def unmake(path: str, context: Context) -> None:
    """Remove what was made for the path, whole or not, and nothing else."""
    durable.discard_temporary(path, context.token)
    for made in context.journal.claims(path):
        durable.remove(path, (made.generation, made.inode))
        context.journal.unclaim(made)


def take_name(step: TakeName) -> None:
    """Put the merged file in place under another name as well."""
    if os.path.exists(step.source):
        copy_notes(step.target, step.source)
        durable.put_in_place(step.source, step.target)


def unlink(step: Unlink, context: Context) -> None:
    """Remove a file that nothing needs, if it still is the one that the plan saw."""
    identity = (step.generation, step.inode) if step.inode else None
    if context.journal.owned(step.path):
        return  # After a kill somebody has given the path to a machine again.
    durable.remove(step.path, identity)
    context.journal.unclaim(Claim(step.path, step.generation, step.inode))
