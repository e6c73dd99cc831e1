"""Which layers are not what the tree says, by comparing it with what was just read."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from snaptree.errors import UnhealthyError
from snaptree.model.layer import LayerId
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree


class Ailment(Struct, frozen=True):
    """What is wrong with one layer: a word of DESIGN.md, and a sentence."""

    word: str
    detail: str

    @property
    def blocks(self) -> bool:
        """Whether nothing may be built on the layer; a half-merged one is whole through the layer above it."""
        return self.word != "half-merged"


def ailments(tree: Tree, survey: Survey) -> Mapping[LayerId, Ailment]:
    """What is wrong with each unhealthy layer that the survey has facts of."""
    found: dict[LayerId, Ailment] = {}
    for layer in tree.layers.values():
        facts = survey.layers.get(layer.id)
        if facts is None:
            continue
        astray = survey.live.astray.get(layer.id) if survey.live is not None else None
        ailment = _ailment(tree, layer.id, survey) or (Ailment("changed", astray) if astray is not None else None)
        if ailment is None and layer.half_merged:
            ailment = Ailment("half-merged", f"a commit into {layer.path} waits to go on; gc finishes it")
        if ailment is not None:
            found[layer.id] = ailment
    return found


def _ailment(tree: Tree, layer_id: LayerId, survey: Survey) -> Ailment | None:
    layer, facts = tree.layers[layer_id], survey.layers[layer_id]
    if facts.problem:
        return Ailment(facts.problem, facts.detail or f"{layer.path}: {facts.problem}")
    if facts.format != layer.format:
        return Ailment("changed", f"{layer.path} is {facts.format}, the tree knows it as {layer.format}")
    if layer_id in survey.busy:
        return None
    was, now = layer.identity, facts.identity
    if was is not None and now is not None and not layer.half_merged:
        known = was.generation and now.generation
        other = was.inode != now.inode or bool(known and was.generation != now.generation)
        if other and not facts.block_device:
            return Ailment("changed", f"{layer.path} is another file than the one that was frozen")
        # A device's node is a new one after each boot, and whenever the device comes back; it tells no times from then.
        written = not other and was.mtime_ns != now.mtime_ns
        if written or (was.size, was.header) != (now.size, now.header):
            return Ailment("changed", f"{layer.path} was written to after it was frozen")
    if layer.owned:
        parent = tree.layers[layer.parent].path if layer.parent is not None else None
        if facts.backing != parent:
            return Ailment(
                "changed",
                f"{layer.path} names {facts.backing or 'nothing'} as its backing file, not {parent or 'nothing'}",
            )
    missing = sorted(set(tree.internals.get(layer_id, ())) - {each.name for each in facts.internals})
    if missing:
        return Ailment("missing", f"{layer.path} has no internal snapshot {missing[0]!r} any more")
    return None


def chain_ailment(tree: Tree, found: Mapping[LayerId, Ailment], layer: LayerId) -> Ailment | None:
    """The nearest thing that is wrong with the layer or a layer beneath it, if it blocks."""
    for each in tree.chain(layer):
        ailment = found.get(each.id)
        if ailment is not None and ailment.blocks:
            return ailment
    return None


def require_whole(tree: Tree, found: Mapping[LayerId, Ailment], layer: LayerId, purpose: str) -> None:
    """Refuse to build on a layer whose chain is unhealthy.

    :raise UnhealthyError: names the file and what is wrong with it.
    """
    ailment = chain_ailment(tree, found, layer)
    if ailment is not None:
        raise UnhealthyError(
            f"cannot {purpose}: {ailment.detail} ({ailment.word})",
            f"see what is wrong with 'snaptree verify {tree.machine}'",
        )
