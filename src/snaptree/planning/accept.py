"""Taking a layer that was changed from outside for what it is now, and one that is foreign for the machine's own."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from snaptree.errors import NotFoundError, RefusedError
from snaptree.model.layer import Layer, LayerId
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.draft import Draft
from snaptree.planning.health import ailments
from snaptree.planning.plan import Plan


class AcceptRequest(Struct, frozen=True):
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


class OwnRequest(Struct, frozen=True):
    """``snaptree set NAME --adopt``: what the disks of a domain stand on is its own, as the user knows."""


def all_owned(tree: Tree) -> Tree:
    """The tree with nothing foreign, to read what stands on each of its layers."""
    return tree.with_layers(*(replace(each, owned=True) for each in tree.layers.values()))


def own(tree: Tree, survey: Survey) -> Plan:
    """Plan to own what the active tips stand on, down to where something else stands on it too.

    :raise RefusedError: nothing is foreign, or nothing that is can be owned.
    """
    if not survey.libvirt:
        raise RefusedError(
            f"{tree.machine} was added: its chain is adopted by adding it",
            f"'snaptree remove {tree.machine}', then 'snaptree add {tree.machine} --adopt …'",
        )
    draft = Draft(tree, survey)
    owned: dict[LayerId, Layer] = {}
    for tip in tree.active_branch.tips.values():
        for layer in tree.chain(tip.layer):
            others = [each.what for each in survey.outsiders if each.layer == layer.id]
            if not layer.owned and others:
                draft.notes.append(f"{layer.path} and what is beneath it stay foreign: {others[0]} stands on it")
                break
            if not layer.owned:
                owned[layer.id] = replace(layer, owned=True)
    if not owned:
        why = draft.notes[0] if draft.notes else "the domain's disks stand on nothing that is foreign"
        raise RefusedError(why, f"see 'snaptree show {tree.machine}'")
    draft.notes += [f"{layer.path} is {tree.machine}'s own from now on" for layer in owned.values()]
    draft.tree = tree.with_layers(*owned.values())
    roots = {
        disk: (root.path, root.format)
        for disk, tip in tree.active_branch.tips.items()
        if (root := draft.tree.owned_root(tip.layer)) is not None
    }
    draft.tree = replace(draft.tree, roots={**tree.roots, **roots})
    return draft.conclude("adopt", "own what the disks stand on", "what the disks stand on is the domain's own")
