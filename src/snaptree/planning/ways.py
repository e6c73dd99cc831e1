"""Which layers can be merged with what stands on them, and which way costs least."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Mapping, Sequence

from msgspec import Struct

from snaptree.errors import NoSpaceError
from snaptree.model.layer import Layer, LayerId
from snaptree.model.sizes import readable
from snaptree.model.survey import RowFacts
from snaptree.model.tree import Tree
from snaptree.planning.draft import Draft
from snaptree.planning.sealing import key_hint, unopened
from snaptree.planning.settle import is_loose

Row = tuple[LayerId, ...]
"""Layers to merge, lowest first. All but the last are loose (or, for a copy of a shared layer, shared)."""

WAYS = ("auto", "none", "commit", "pull", "reflink")
METADATA_BYTES = 1 << 20
"""Room kept for tables that grow, when asking whether a merge fits."""


MOST_TABLES = (32 << 20) // 8
"""QEMU opens no qcow2 image with an L1 table of more entries (``block/qcow2.h``: QCOW_MAX_L1_SIZE)."""


class Choice(Struct, frozen=True):
    """One merge with the way that was chosen for it, and which file takes the data: the lowest, or the highest."""

    row: Row
    way: str
    facts: RowFacts
    down: bool

    @property
    def moves(self) -> int:
        """What comes into the file that takes it, copied or shared."""
        return self.facts.commit_bytes if self.down else self.facts.pull_bytes

    @property
    def bytes(self) -> int:
        """What it copies."""
        return self.facts.share_bytes[not self.down] if self.way == "reflink" else self.moves

    @property
    def extents(self) -> int:
        """How many runs of clusters move."""
        return self.facts.extents[not self.down]

    @property
    def grows(self) -> int:
        """The room that it takes until the files that are merged go."""
        if self.way == "reflink":
            return self.facts.share_grows[not self.down]
        return self.adds

    @property
    def adds(self) -> int:
        """By how much the file that takes the data is larger afterwards, blocks that it shares with others included."""
        return self.facts.commit_grows if self.down else self.facts.pull_grows


def row_of(tree: Tree, layer: LayerId, outsiders: Collection[LayerId]) -> Row:
    """The longest run of loose layers around the loose layer, and the one on which it ends."""
    lowest = layer
    while (below := tree.layers[lowest].parent) is not None and is_loose(tree, below, outsiders):
        lowest = below
    row = [lowest]
    while is_loose(tree, row[-1], outsiders):
        row.append(tree.children[row[-1]][0])
    return tuple(row)


def rows_to_merge(tree: Tree, loose: Collection[LayerId], outsiders: Collection[LayerId]) -> tuple[Row, ...]:
    """The rows that the loose layers are in, each once."""
    rows: list[Row] = []
    covered: set[LayerId] = set()
    for layer in sorted(loose):
        if layer in tree.layers and layer not in covered:
            rows.append(row_of(tree, layer, outsiders))
            covered.update(rows[-1][:-1])
    return tuple(sorted(rows))


def copies_of_shared(tree: Tree, shared: Collection[LayerId], outsiders: Collection[LayerId]) -> tuple[Row, ...]:
    """The rows that give each thing above shared layers its own copy; the active line comes last and keeps the name.

    Shared layers that stand on one another, with loose ones between, are copied together.
    """
    active = {each.id for point in tree.active_branch.tips.values() for each in tree.chain(point.layer)}
    between = {layer for layer in tree.layers if is_loose(tree, layer, outsiders)} | (set(shared) - set(outsiders))
    rows: list[Row] = []
    for layer in tree.layers.values():
        if layer.id in between or layer.parent not in between:
            continue
        row = [layer.id]
        while (below := tree.layers[row[0]].parent) is not None and below in between:
            row.insert(0, below)
        if any(each in shared for each in row):
            rows.append(tuple(row))
    return tuple(sorted(rows, key=lambda row: (row[-1] in active, row)))


# ---- which way ----------------------------------------------------------------------------------------------------


def obstacles(draft: Draft, row: Row) -> Mapping[str, str]:
    """Why the row cannot be merged in each way; a way that is not there is open.

    Sharing blocks is told apart by the file that takes them: ``reflink`` is into the lowest, ``reflink up`` into the
    highest.
    """
    tree, found = draft.tree, {}
    lowest, top = tree.layers[row[0]], tree.layers[row[-1]]
    unshared = draft.survey.rows[row].unshared
    for down, written in ((True, lowest), (False, top)):
        reason = _common_obstacle(draft, row, written)
        if not reason:
            reason = _commit_obstacle(draft, row) if down else _pull_obstacle(draft, row)
        if reason:
            found["commit" if down else "pull"] = reason
        if not down and is_owned_root(tree, lowest.id) and is_loose(tree, lowest.id, draft.outsiders):
            reason = reason or f"{lowest.path} is the root, and a copy of {top.path} would not have its name"
        if reason or unshared:
            found["reflink" if down else "reflink up"] = reason or unshared
    return found


def _common_obstacle(draft: Draft, row: Row, written: Layer) -> str:
    tree = draft.tree
    for layer in (tree.layers[each] for each in row):
        ailment = draft.ailments.get(layer.id)
        if ailment is not None and ailment.blocks:
            return f"{ailment.detail} ({ailment.word})"
        facts = draft.facts(layer.id)
        if facts.bitmaps:
            return f"{layer.path} has persistent bitmaps ({', '.join(facts.bitmaps)}), which a merge would drop"
        if layer.id not in draft.survey.layers:
            return f"{layer.path} has only just been made"
        if not facts.removable:
            return f"the folder of {layer.path} may not be changed"
    top = tree.layers[row[-1]]
    # A top that is longer than what is beneath it gets the zeroes that it shows there, whatever the way.
    covered = any(tree.layers[each].virtual_size < top.virtual_size for each in row[:-1])
    changed = (written, *([top] if covered else []))
    plain = next((each.path for each in changed if not draft.facts(each.id).encrypted), None)
    for layer in (*(tree.layers[each] for each in row[1:]), *tree.chain(row[0])):
        if reason := unopened(draft, layer.id, running=draft.is_open(row[-1])):
            return f"{reason} ({key_hint(draft, layer.id)})"
        if draft.facts(layer.id).encrypted and plain is not None:
            return f"{layer.path} is encrypted, and {plain} is not, where its data would come to lie"
    for layer in tree.chain(row[0]):
        ailment = draft.ailments.get(layer.id)
        if ailment is not None and ailment.blocks:
            return f"{ailment.detail} ({ailment.word})"
    for layer in changed:
        facts = draft.facts(layer.id)
        if facts.block_device:
            return f"{layer.path} is a block device"
        if not facts.writable:
            return f"{layer.path} cannot be written to"
        if facts.links > 1:
            return f"{layer.path} has {facts.links} names (hard links), and the others would see it change"
    for layer in (tree.layers[each] for each in row):
        target, source = draft.facts(written.id), draft.facts(layer.id)
        if target.opens(source):
            rights = f"{target.mode:04o} for group {target.group} and {source.mode:04o} for group {source.group}"
            return (
                f"{written.path} may be read by users who may not read {layer.path} ({rights}); "
                "make both alike with chmod and chgrp, or merge all the same with --merge"
            )
    return ""


def _commit_obstacle(draft: Draft, row: Row) -> str:
    tree = draft.tree
    lowest, top = tree.layers[row[0]], tree.layers[row[-1]]
    for each in row[:-1]:
        if not is_loose(tree, each, draft.outsiders):
            return f"something else stands on {tree.layers[each].path}"
    if top.id in draft.outsiders:
        who = next(each.what for each in draft.survey.outsiders if each.layer == top.id)
        return f"{who} stands on {top.path}, which would go"
    for number in tree.children.get(top.id, ()):
        if not draft.facts(number).writable:
            return f"{tree.layers[number].path} stands on {top.path} and cannot be pointed elsewhere: it is read-only"
    known = {each.name for each in draft.facts(top.id).internals} | set(tree.internals.get(top.id, ()))
    if known:
        return f"{top.path} has internal snapshots, which would show the wrong data"
    facts = draft.facts(lowest.id)
    if facts.internals and top.virtual_size < lowest.virtual_size:
        return (
            f"{lowest.path} has internal snapshots and cannot be shrunk to {top.virtual_size} bytes "
            "(--merge commit makes them external first)"
        )
    if facts.internals and facts.version < 3 and top.virtual_size > lowest.virtual_size:
        return f"{lowest.path} is qcow2 version 2 with internal snapshots and cannot be grown"
    covered = facts.cluster_size**2 // (16 if facts.extended_l2 else 8)
    if lowest.format == "qcow2" and top.virtual_size > covered * MOST_TABLES:
        return f"{lowest.path} has clusters of {facts.cluster_size} bytes, too small for {top.virtual_size} bytes"
    below = tree.layers[lowest.parent].virtual_size if lowest.parent is not None else 0
    if lowest.virtual_size < min(top.virtual_size, below) and lowest.format == "qcow2" and facts.version < 3:
        return f"{lowest.path} is qcow2 version 2 and shorter than what is above and below it"
    return ""


def _pull_obstacle(draft: Draft, row: Row) -> str:
    tree = draft.tree
    top = tree.layers[row[-1]]
    if draft.facts(top.id).internals or tree.internals.get(top.id):
        return f"{top.path} has internal snapshots, which need what is below it"
    if not draft.facts(row[0]).writable:
        return f"{tree.layers[row[0]].path} may not be changed"
    if is_owned_root(tree, row[0]) and tree.layers[row[0]].format != top.format:
        root = tree.layers[row[0]]
        return f"{root.path} is {root.format} and stays so unless --merge pull says otherwise"
    if posixpath.dirname(top.path) != posixpath.dirname(tree.layers[row[0]].path) and is_owned_root(tree, row[0]):
        return f"{top.path} is in another folder, and the root's name stays unless --merge pull says otherwise"
    for each in row[:-1]:
        strange = {one.name for one in draft.facts(each).internals} - set(tree.internals.get(each, ()))
        if strange:
            return f"{tree.layers[each].path} has an internal snapshot {min(strange)!r} that the tree does not know"
    if any(tree.internals.get(each) for each in row[:-1]):
        return "an internal snapshot needs the lower file, which would stay all the same"
    return ""


def is_owned_root(tree: Tree, layer: LayerId) -> bool:
    """Whether the layer is the lowest owned one of its disk and has the name that the disk came with."""
    known = tree.layers[layer]
    below = tree.layers[known.parent] if known.parent is not None else None
    return known.owned and (below is None or not below.owned) and tree.roots.get(known.disk, ("", ""))[0] == known.path


def choose(draft: Draft, row: Row, way: str) -> Choice | str:
    """The way to merge the row, or the sentence that says why it stays as it is.

    ``auto`` takes the way that copies the fewest bytes among those that are open.
    """
    facts = draft.survey.rows[row]
    closed = dict(obstacles(draft, row))
    asked = {"auto": ("commit", "pull", "reflink", "reflink up"), "reflink": ("reflink", "reflink up")}.get(way, (way,))
    if way != "auto":
        for each in asked:
            open_as_asked(draft, row, each, closed)
    choices = [
        Choice(row, each.partition(" ")[0], facts, down=each in ("commit", "reflink"))
        for each in asked
        if each not in closed
    ]
    if not choices:
        below = draft.tree.layers[row[0]].path
        reasons = dict.fromkeys(closed[each] for each in asked if way != "auto" or not each.startswith("reflink"))
        return f"{below} stays as it is: {'; '.join(reasons)}"
    rooted = is_owned_root(draft.tree, row[0])
    fitting = [choice for choice in choices if _fits(draft, [choice])] or choices
    return min(fitting, key=lambda choice: _dearness(choice, rooted=rooted))


def open_as_asked(draft: Draft, row: Row, way: str, closed: dict[str, str]) -> None:
    """Open a way that is closed only unless it is asked for, and say what follows from it."""
    reason = closed.get(way, "")
    if "stays so unless" in reason and way == "pull":
        draft.notes.append(f"the root of {draft.tree.layers[row[0]].disk} becomes qcow2, as --merge pull asks")
        del closed[way]
    elif ("name stays unless" in reason or "stay all the same" in reason) and way == "pull":
        del closed[way]
    elif "all the same with --merge" in reason:
        draft.notes.append(reason.partition(";")[0])
        del closed[way]
        if way.startswith("reflink") and (unshared := draft.survey.rows[row].unshared):
            closed[way] = unshared


def _dearness(choice: Choice, *, rooted: bool) -> tuple[int, bool, int, bool]:
    """The fewest bytes; at even match without a new file; the fewest extents; the root's file, or the upper path."""
    shares = choice.way == "reflink"
    return choice.bytes, shares, choice.extents if shares else 0, choice.down != rooted


def _fits(draft: Draft, choices: Sequence[Choice]) -> bool:
    return all(need <= free for need, free in room(draft, choices).values())


def require_room(draft: Draft, choices: Sequence[Choice]) -> None:
    """Refuse merges that would not fit.

    :raise NoSpaceError: has the figures.
    """
    for need, free in room(draft, choices).values():
        if need > free:
            files = ", ".join(draft.tree.layers[each.row[0]].path for each in choices)
            raise NoSpaceError(
                f"merging {files} needs {readable(need)} of room, and the file system has {readable(free)}",
                "free some room, or use --merge none and run gc later",
            )


def room(draft: Draft, choices: Sequence[Choice]) -> dict[int, tuple[int, int]]:
    """Per file system: bytes needed, bytes free."""
    room: dict[int, tuple[int, int]] = {}
    for choice in choices:
        target = draft.facts(choice.row[0] if choice.down else choice.row[-1])
        if target.identity is None or target.identity.device not in draft.survey.file_systems:
            continue
        device = target.identity.device
        need, free = room.get(device, (METADATA_BYTES, draft.survey.file_systems[device].free))
        room[device] = (need + choice.grows, free)
    return room
