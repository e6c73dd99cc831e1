"""What goes between two trees: the steps that remove what the one before had and the one after does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snaptree.errors import RefusedError
from snaptree.model.live import Live
from snaptree.model.memory import Memory
from snaptree.model.snapshot import FirmwareFile
from snaptree.model.tree import Tree
from snaptree.planning.memory_steps import GoOver
from snaptree.planning.sealing import require_keys
from snaptree.planning.steps import DeleteInternal, RemoveFirmware, Step, Unlink

if TYPE_CHECKING:
    from snaptree.planning.draft import Draft


def cleared(draft: Draft, after: Tree) -> tuple[list[Step], int]:
    """The steps that remove what the tree before had and the tree after does not, and how many bytes that frees."""
    steps: list[Step] = []
    freed = 0
    gone = [layer for layer in draft.before.layers.values() if layer.id not in after.layers and layer.owned]
    named = {layer.path for layer in after.layers.values()}
    for layer in draft.before.deepest_first(gone):
        facts = draft.facts(layer.id)
        if layer.id in draft.fresh:
            steps.append(Unlink(layer.path, 0, 0))
        if layer.id in draft.spared or facts.identity is None or facts.problem == "missing":
            continue
        if facts.block_device:
            draft.notes.append(f"{layer.path} stays: it is a block device")
            continue
        room = facts.allocated if facts.links == 1 else 0
        freed += room
        if layer.path in named:
            continue  # The rename that put the merged layer in its place has removed it.
        steps.append(Unlink(layer.path, facts.identity.generation, facts.identity.inode, room))
    for layer in draft.before.layers.values():
        now = after.layers.get(layer.id)
        if now is None or now.path == layer.path:
            continue
        identity = draft.facts(layer.id).identity
        if identity is not None:
            # It has taken another name; the old one is a second name of the same file, or that of a copy.
            steps.append(Unlink(layer.path, identity.generation, identity.inode))
        elif layer.id in draft.fresh:
            steps.append(Unlink(layer.path, 0, 0))
    over = any(isinstance(step, GoOver) for step in draft.prepare)
    for layer_id, tags in draft.before.internals.items():
        if layer_id not in after.layers or not after.layers[layer_id].owned:
            continue
        kept = set(after.internals.get(layer_id, ()))
        path = after.layers[layer_id].path
        going = [tag for tag in tags if tag not in kept]
        live = draft.survey.live
        if going:
            purpose = f"delete the internal snapshot {going[0]!r} in {path}"
            require_keys(draft, (after.layers[layer_id],), purpose, running=not over)
        if going and live is not None and live.let_go and layer_id in live.open:
            raise RefusedError(
                f"cannot delete the internal snapshot {going[0]!r} in {path}: "
                "its QEMU has let go of the disks with the memory that was saved",
                "let the guest go on, or turn it off, and try again",
            )
        if going and live is not None and draft.is_busy(layer_id) and not over:
            _require_no_job(live, after.layers[layer_id].disk, f"the internal snapshot {going[0]!r} in {path}")
        steps.extend(DeleteInternal(path, tag) for tag in going)
    for piece in sorted(firmware_of(draft.before) - firmware_of(after), key=lambda each: each.path):
        steps.append(RemoveFirmware(piece.role, piece.path))
    for memory in draft.before.memories.values():
        if memory.id not in after.memories:
            steps.append(removal(memory))
            freed += memory.size
    return steps, freed


def _require_no_job(live: Live, disk: str, what: str) -> None:
    """Refuse what QEMU does to a tip only when nothing else works on it: it would refuse after the name has gone.

    :raise RefusedError: a job of somebody's does.
    """
    if job := live.jobs.get(disk):
        raise RefusedError(
            f"cannot delete {what}: QEMU's job {job}, which is none of snaptree's, works on {disk}",
            "wait until that has ended, or cancel it",
        )


def removal(memory: Memory) -> Unlink:
    """The step that removes a memory's file."""
    looks = memory.identity
    known = (looks.generation, looks.inode) if looks is not None else (0, 0)
    return Unlink(memory.path, *known, memory.size)


def firmware_of(tree: Tree) -> set[FirmwareFile]:
    """All copies of firmware state that the tree refers to."""
    return {piece for each in tree.named for piece in each.firmware}
