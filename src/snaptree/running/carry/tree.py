"""Steps that change what is remembered."""

from __future__ import annotations

import os
from collections.abc import Collection

from msgspec.structs import replace

from snaptree.errors import IoError
from snaptree.images import memory_file
from snaptree.images.facts import read_facts
from snaptree.model.layer import Identity, Layer, LayerId
from snaptree.model.memory import Memory
from snaptree.planning.steps import Record, Register
from snaptree.running.context import Context


def record(step: Record, context: Context) -> None:
    """Change the tree, and keep what newly frozen layers and new memories look like."""
    memories = {number: each for number, each in step.delta.memories.items() if each is not None}
    new = {number: each for number, each in memories.items() if each.identity is None}
    if step.otherwise is not None and not _all_saved(new.values(), context):
        step = replace(step, delta=step.otherwise)
    elif new:
        found = {number: _as_saved(each, context) for number, each in new.items()}
        step = replace(step, delta=replace(step.delta, memories={**step.delta.memories, **found}))
    identities: dict[LayerId, Identity] = {}
    # What the plan knows of a frozen layer's looks may be older than an earlier step's writing.
    frozen = [layer.id for layer in step.delta.layers.values() if layer is not None and layer.identity is not None]
    for number in dict.fromkeys((*step.baseline, *frozen)):
        layer = step.delta.layers.get(number) or context.journal.layer(number)
        if layer is not None:
            identities[number] = identity_of(layer)
    context.journal.record(step, identities)


def _as_saved(saved: Memory, context: Context) -> Memory:
    """The memory with what its file looks like."""
    identity = memory_file.identity_of(saved.path)
    from snaptree.running.carry import memory

    return replace(saved, identity=identity, size=identity.size, form=memory.form_of(saved.path, context))


def _all_saved(memories: Collection[Memory], context: Context) -> bool:
    from snaptree.running.carry import memory

    return all(memory.is_whole(each.path, context) for each in memories)


def identity_of(layer: Layer) -> Identity:
    """What the layer's file looks like now.

    :raise IoError: it cannot be read, or its header cannot, by which it is known too.
    """
    facts = read_facts(layer.path, layer.format)
    if facts.identity is None or facts.problem == "unreadable":
        raise IoError(facts.detail or f"{layer.path} cannot be read", "mend it, then run 'snaptree recover'")
    return facts.identity


def register(step: Register, context: Context) -> None:
    """Remember a machine."""
    known = context.journal.machine_known()
    context.journal.register(step, new=not known and not context.recovering)


def refresh(paths: tuple[str, ...], context: Context) -> None:
    """Keep anew what frozen layers look like that a step has written to, as it may."""
    for layer in context.journal.frozen_at(paths):
        if os.path.exists(layer.path):
            context.journal.remember(layer.id, identity_of(layer))
