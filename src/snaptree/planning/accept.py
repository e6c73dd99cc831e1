"""Taking a layer that was changed from outside for what it is now."""

from __future__ import annotations

from dataclasses import dataclass, replace

from snaptree.errors import NotFoundError, RefusedError
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.draft import Draft
from snaptree.planning.health import ailments
from snaptree.planning.plan import Plan


@dataclass(frozen=True)
class AcceptRequest:
    """``snaptree verify NAME --accept PATH``: the user has looked at the layer, and vouches for what it holds now."""

    path: str


def accept(tree: Tree, survey: Survey, request: AcceptRequest) -> Plan:
    """Plan to keep what a frozen layer looks like now, as if it had just been frozen.

    :raise NotFoundError: the machine has no layer there.
    :raise RefusedError: the file does not fit into the tree as it is; nothing can be vouched for.
    """
    layer = next((each for each in tree.layers.values() if each.path == request.path), None)
    if layer is None:
        raise NotFoundError(
            f"machine {tree.machine} has no layer at {request.path}", f"see 'snaptree show {tree.machine}'"
        )
    if layer.identity is None:
        raise RefusedError(
            f"{layer.path} is not compared with anything: it is foreign, or a guest writes to it",
            "only frozen layers of snaptree's can be accepted",
        )
    taken = tree.with_layers(replace(layer, identity=None))
    ailment = ailments(taken, survey).get(layer.id)
    if ailment is not None and ailment.blocks:
        raise RefusedError(
            f"{layer.path} cannot be taken as it is: {ailment.detail} ({ailment.word})",
            "mend that first; only what was written to it, or that it is another file, can be accepted",
        )
    draft = Draft(tree, survey)
    draft.tree = taken
    if layer.id not in ailments(tree, survey):
        draft.notes.append(f"{layer.path} was as it should be")
    return draft.conclude("accept", f"take {layer.path} as it is", f"{layer.path} is taken for what it is now")
