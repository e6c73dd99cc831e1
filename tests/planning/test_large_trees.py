"""Trees with very many layers: what is worked out of them is not worked out anew for each merge."""

from __future__ import annotations

import pytest

from snaptree.model.branch import Branch
from snaptree.model.layer import Identity, Layer, Point
from snaptree.model.snapshot import Snapshot
from snaptree.model.survey import LayerFacts, RowFacts, Survey
from snaptree.model.tree import Tree
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.unmeasured import Unmeasured
from snaptree.planning.verbs import plan

LINES = 30


def comb() -> Tree:
    """root <- (s1 <- tip) for each of many lines."""
    layers = {1: Layer(1, "vda", "/1.qcow2", "qcow2", None, True, 1 << 20, Identity(1, 1, 0, 0))}
    snapshots = {"root": Snapshot("root", None, {"vda": Point(1)}, 0.0)}
    branches: dict[str, Branch] = {}
    for number in range(2, 2 + 3 * LINES, 3):
        middle, upper, tip = number, number + 1, number + 2
        for each, parent in ((middle, 1), (upper, middle), (tip, upper)):
            identity = Identity(1, each, 0, 0) if each != tip else None
            layers[each] = Layer(each, "vda", f"/{each}.qcow2", "qcow2", parent, True, 1 << 20, identity)
        snapshots[f"s{middle}"] = Snapshot(f"s{middle}", "root", {"vda": Point(middle)}, 1.0)
        snapshots[f"s{upper}"] = Snapshot(f"s{upper}", f"s{middle}", {"vda": Point(upper)}, 2.0)
        name = "main" if not branches else f"b{tip}"
        branches[name] = Branch(name, f"s{upper}", {"vda": Point(tip)}, 3.0)
    return Tree("web1", "main", layers, snapshots, branches, {}, {"vda": ("/1.qcow2", "qcow2")})


def test_merges_that_follow_one_another_do_not_look_through_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = comb()
    facts = {
        layer.id: LayerFacts(
            layer.path,
            identity=Identity(1, layer.id, 0, 0),
            virtual_size=1 << 20,
            allocated=1 << 20,
            backing=tree.layers[layer.parent].path if layer.parent else None,
        )
        for layer in tree.layers.values()
    }
    survey = Survey(layers=facts, names={"/": frozenset()}, now=1.0)
    request = DeleteRequest(("root",), children=True)
    with pytest.raises(Unmeasured) as wanted:
        plan(tree, survey, request)
    rows = {row: RowFacts(1, 0, 1, 1, 1) for row in wanted.value.rows}
    measured = Survey(layers=facts, names={"/": frozenset()}, rows=rows, now=1.0)
    looked = 0
    children = Tree.__dict__["children"]
    work = children.func

    def counted(tree: Tree) -> object:
        nonlocal looked
        looked += 1
        return work(tree)

    monkeypatch.setattr(children, "func", counted)

    made = plan(tree, measured, request)

    assert sum(bool(each.way) for each in made.every()) == LINES
    assert looked < 10
