"""What a machine looks like: for programs, and drawn for people. Pure functions of a :class:`View`."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from snaptree.model.branch import Branch
from snaptree.model.layer import LayerId, Point
from snaptree.model.names import visible
from snaptree.model.sizes import readable
from snaptree.model.snapshot import Snapshot
from snaptree.model.tree import Tree
from snaptree.planning.settle import role

if TYPE_CHECKING:
    from snaptree.machines.machine import View

VERSION = 1


def moment(seconds: float) -> str:
    """A time for people, in the local zone."""
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def show(view: View) -> dict[str, Any]:
    """The form of ``show --json`` (DESIGN.md, "The command line"); changed only by adding."""
    tree = view.tree
    freed = frees(view)
    outsiders = frozenset(each.layer for each in view.survey.outsiders)
    return {
        "version": VERSION,
        "machine": tree.machine,
        "provider": view.config.provider,
        "state": view.state,
        "state_detail": view.why,
        "active_branch": tree.active,
        "disks": [
            {
                "target": disk,
                "path": tree.layers[point.layer].path,
                "format": tree.layers[point.layer].format,
                "virtual_size": _size(view, point.layer),
            }
            for disk, point in sorted(tree.active_branch.tips.items())
        ],
        "snapshots": [
            {
                "name": each.name,
                "parent": each.parent,
                "kind": each.kind,
                "created": each.created,
                "description": each.description,
                "consistency": each.consistency,
                "memory": tree.memories[each.memory].path if each.memory is not None else None,
                "frees": freed[each.name].bytes,
                "points": _points(tree, each.points),
            }
            for each in sorted(tree.snapshots.values(), key=lambda one: (one.created, one.name))
        ],
        "branches": [
            {
                "name": each.name,
                "parent": each.parent,
                "active": each.name == tree.active,
                "memory": tree.memories[each.memory].path if each.memory is not None else None,
                "frees": freed[each.name].bytes,
                "tips": _points(tree, each.tips),
            }
            for each in sorted(tree.branches.values(), key=lambda one: (one.created, one.name))
        ],
        "layers": [
            {
                "disk": layer.disk,
                "path": layer.path,
                "format": layer.format,
                "parent": tree.layers[layer.parent].path if layer.parent is not None else None,
                "role": role(tree, layer.id, outsiders),
                "owned": layer.owned,
                "virtual_size": _size(view, layer.id),
                "allocated": view.survey.layers[layer.id].allocated if layer.id in view.survey.layers else 0,
                "health": view.ailments[layer.id].word if layer.id in view.ailments else "ok",
                "encrypted": layer.id in view.survey.layers and view.survey.layers[layer.id].encrypted,
            }
            for layer in tree.layers.values()
        ],
        "memories": [
            {
                "path": memory.path,
                "form": memory.form,
                "size": memory.size,
                "names": sorted(each.name for each in tree.named if each.memory == memory.id),
                "health": "ok" if memory.id not in view.survey.memories else "changed",
            }
            for memory in tree.memories.values()
        ],
        "pending": list(view.pending),
        "notes": list(view.notes),
    }


def _size(view: View, layer: LayerId) -> int:
    facts = view.survey.layers.get(layer)
    return facts.virtual_size if facts is not None and facts.virtual_size else view.tree.layers[layer].virtual_size


def _points(tree: Tree, points: Mapping[str, Point]) -> dict[str, dict[str, str | None]]:
    return {
        disk: {"path": tree.layers[point.layer].path, "internal": point.internal}
        for disk, point in sorted(points.items())
    }


class Freed(Struct, frozen=True):
    """What deleting a name frees at once; ``more`` when merging what becomes loose may free more."""

    bytes: int
    more: bool


def saying(freed: Freed) -> str:
    """What deleting frees, for people."""
    if freed.more and not freed.bytes:
        return "frees by merging"
    return f"frees {'≥ ' if freed.more else ''}{readable(freed.bytes)}"


def frees(view: View) -> Mapping[str, Freed]:
    """What deleting each name, by itself, would free. No table is read: a merge may free more."""
    tree = view.tree
    outsiders = frozenset(each.layer for each in view.survey.outsiders)
    return {each.name: _freed(view, each, outsiders) for each in tree.named}


def _freed(view: View, named: Snapshot | Branch, outsiders: frozenset[LayerId]) -> Freed:
    tree = view.tree
    freed, more = 0, False
    points = named.points if isinstance(named, Snapshot) else named.tips
    for point in set(points.values()):
        if point.internal is not None:
            more = more or len(tree.names_on.get(point, ())) == 1
            continue
        at: LayerId | None = point.layer
        alone = True
        while at is not None and alone:
            layer = tree.layers[at]
            others = [name for name in tree.names_on.get(Point(at), ()) if name != named.name]
            children = tree.stands_on(at) - (0 if at == point.layer else 1)
            if not layer.owned or others or tree.internals.get(at) or at in outsiders:
                break
            if children == 1 and at == point.layer:
                more = True
            if children:
                more = more or (children == 1)
                break
            facts = view.survey.layers.get(at)
            freed += facts.allocated if facts is not None and facts.links == 1 else 0
            at = layer.parent
            if at is not None and tree.layers[at].owned and tree.stands_on(at) == 2 and not tree.needed(at):
                more = True
                break
    if named.memory is not None and sum(each.memory == named.memory for each in tree.named) == 1:
        freed += tree.memories[named.memory].size
    return Freed(freed, more)


# ---- drawing ------------------------------------------------------------------------------------------------------


class Node(Struct, frozen=True):
    """One line of the drawing: ``named`` is a snapshot or a branch, ``lead`` the lines that lead to it."""

    lead: str
    named: Snapshot | Branch


def nodes(tree: Tree) -> Iterator[Node]:
    """Snapshots and branches in the order in which they are drawn, with the lines that lead to them.

    A line of snapshots, each grown from the one before, goes straight down; only forks indent.
    """
    branches: dict[str | None, list[Branch]] = {}
    for branch in sorted(tree.branches.values(), key=lambda one: (one.name == tree.active, one.created, one.name)):
        branches.setdefault(branch.parent, []).append(branch)

    def grown(name: str | None) -> list[Snapshot | Branch]:
        snapshots = [tree.snapshots[child] for child in tree.child_snapshots.get(name, ())]
        return [*snapshots, *branches.get(name, ())]

    # (named, lead of this line, lead of what hangs below it)
    stack: list[tuple[Snapshot | Branch, str, str]] = []

    def push(children: list[Snapshot | Branch], below: str) -> None:
        if not children:
            return
        # The last one goes on straight; the others fork off before it.
        stack.append((children[-1], below, below))
        stack.extend((child, below + "├─", below + "│ ") for child in reversed(children[:-1]))

    push(grown(None), "")
    while stack:
        named, lead, below = stack.pop()
        yield Node(lead, named)
        if isinstance(named, Snapshot):
            push(grown(named.name), below)


def draw(view: View) -> list[str]:
    """The tree for a terminal, with "you are here", what deleting each name frees, and what is wrong or pending."""
    import click

    tree = view.tree
    freed = frees(view)
    rows: list[tuple[str, str, str]] = []
    for node in nodes(tree):
        named = node.named
        sign = "●" if isinstance(named, Snapshot) else "○"
        label = click.style(named.name, bold=named.name == tree.active)
        cost = freed[named.name]
        room = saying(cost)
        remarks = _remarks(view, named)
        width = len(node.lead) + 2 + len(named.name)
        if isinstance(named, Snapshot):
            tail = f"{moment(named.created)}  {room}"
        elif named.name == tree.active:
            tail = click.style("← you are here", fg="green")
        else:
            tail = f"parked            {room}"
        rows.append((f"{node.lead}{sign} {label}", " " * width, tail + (f"  {visible(remarks)}" if remarks else "")))
    widest = max((len(pad) for _, pad, _ in rows), default=0)
    lines = [f"{tree.machine}  disks: {', '.join(tree.disks)}  ({view.state})"]
    lines += [f"{head}{' ' * (widest - len(pad))}  {tail}" for head, pad, tail in rows]
    lines += [
        click.style(visible(f"! {each.detail} ({each.word})"), fg="red")
        for each in view.ailments.values()
        if each.blocks
    ]
    lines += [click.style(visible(f"! {view.why}"), fg="yellow")] if view.why else []
    lines += [click.style(visible(f"… {line}"), fg="yellow") for line in view.pending]
    lines += [visible(f"· {line}") for line in view.notes]
    return lines


def _remarks(view: View, named: Snapshot | Branch) -> str:
    tree = view.tree
    found: list[str] = []
    points = named.points if isinstance(named, Snapshot) else named.tips
    if isinstance(named, Snapshot) and named.kind != "external":
        found.append(named.kind)
    if named.memory is not None:
        wrong = view.survey.memories.get(named.memory)
        found.append("memory" if wrong is None else "memory lost")
    if isinstance(named, Snapshot) and named.consistency == "quiesced":
        found.append("quiesced")
    missing = sorted(set(tree.disks) - set(points))
    if missing:
        found.append(f"without {', '.join(missing)}")
    if view.ailments:
        words = {
            view.ailments[each.id].word
            for point in points.values()
            for each in tree.chain(point.layer)
            if each.id in view.ailments and view.ailments[each.id].blocks
        }
        found += sorted(words)
    if isinstance(named, Snapshot) and named.description:
        text = " ".join(named.description.split())
        found.append(f"“{text[:50]}{'…' if len(text) > 50 else ''}”")
    return ", ".join(found)
