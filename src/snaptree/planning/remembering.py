"""Memory: saving it with a snapshot or a branch that is parked, and what must hold before it is loaded."""

from __future__ import annotations

import posixpath
from dataclasses import replace
from typing import TYPE_CHECKING

from snaptree.errors import ExistsError, NoSpaceError, NotFoundError, RefusedError, UsageError
from snaptree.model.delta import diff
from snaptree.model.memory import BACKGROUND, Memory, Saveable
from snaptree.model.sizes import readable
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.draft import Draft
from snaptree.planning.live_steps import Cut
from snaptree.planning.memory_steps import SaveMemory
from snaptree.planning.plan import Plan
from snaptree.planning.settle import settle
from snaptree.planning.steps import Record, Step

if TYPE_CHECKING:
    from snaptree.planning.create import SnapshotRequest

DEVICES_BYTES = 64 << 20
"""Room for the state of devices, and for what QEMU's own use of memory was mistaken for."""
PAUSE_SECONDS = 0.035
"""So long a guest stands still when its memory is saved in the background, whatever it has (13 to 35 ms measured with
0.25 to 8 GiB)."""
SPEED = 1e9
"""Bytes a second at which memory is written, for an estimate."""


def require_saveable(tree: Tree, survey: Survey, request: SnapshotRequest) -> None:
    """Refuse a snapshot that cannot have memory.

    :raise UsageError: the request contradicts itself.
    :raise RefusedError: the machine does not run, or a disk that the guest writes to would not be of the same instant.
    """
    name = tree.machine
    if not request.memory:
        raise UsageError("--memory-file says where the memory goes, and none is saved", "add --memory")
    if request.internal:
        raise UsageError("--memory and --internal exclude each other", "give one of them")
    if request.exclude:
        raise RefusedError(
            f"the guest goes on writing to {request.exclude[0]}, which would be newer than its memory of it",
            "leave out --exclude, or --memory",
        )
    if survey.live is None:
        raise RefusedError(f"machine {name} is off, and has no memory", "leave out --memory, or start it first")
    require_no_firmware(survey, f"save the memory of {name}")
    require_open(saveable(survey))


def require_no_firmware(survey: Survey, purpose: str) -> None:
    """Refuse memory of a machine whose firmware keeps state in files.

    QEMU has these open, and a second one cannot load beside it.

    :raise RefusedError: it does.
    """
    if survey.firmware:
        role = min(survey.firmware)
        hint = "leave out the memory (--no-memory, or no --memory)"
        raise RefusedError(f"cannot {purpose}: it has {role} state, which does not go together with memory yet", hint)


def saveable(survey: Survey) -> Saveable:
    """What was read of the running machine's memory."""
    assert survey.live is not None and survey.live.memory is not None, "it is read for every request that saves memory"
    return survey.live.memory


def require_open(found: Saveable) -> None:
    """Refuse memory that QEMU cannot save.

    :raise RefusedError: a device is in the way.
    """
    if found.obstacle:
        hint = "take the snapshot without --memory, or take the device away"
        raise RefusedError(f"the memory cannot be saved: {found.obstacle}", hint)


def save(draft: Draft, cuts: tuple[Cut, ...], label: str, chosen: str | None) -> Memory:
    """Save the machine's memory in the same instant in which its disks are frozen.

    :param chosen: where the user wants the file.
    """
    memory, found = new_memory(draft, label, chosen), saveable(draft.survey)
    draft.prepare.append(SaveMemory(cuts, memory.path, cuts[0].tip, found.forms, found.used))
    draft.pause = PAUSE_SECONDS if found.forms[0] == BACKGROUND else found.used / SPEED
    return memory


def new_memory(draft: Draft, label: str, chosen: str | None = None) -> Memory:
    """A memory that is still to be saved, added to the tree: its size and what its file looks like are not known yet.

    :raise NoSpaceError: there is no room for it.
    """
    survey, found = draft.survey, saveable(draft.survey)
    path = _new_path(draft, label, chosen)
    need = min(found.used, found.ram) + DEVICES_BYTES
    free = survey.free.get(posixpath.dirname(path), need)
    if need > free:
        raise NoSpaceError(
            f"the memory takes up to {readable(need)}, and there is {readable(free)} for {path}",
            "free some room there, or choose another place with --memory-file",
        )
    assert survey.live is not None
    memory = Memory(
        id=max(draft.before.memories, default=0) + 1,
        path=path,
        form=found.forms[0],
        size=found.used,
        needs=found.needs,
        state=survey.live.state,
    )
    draft.tree = replace(draft.tree, memories={**draft.tree.memories, memory.id: memory})
    draft.bytes += found.used
    draft.extra += found.used
    return memory


def _new_path(draft: Draft, label: str, chosen: str | None) -> str:
    survey, known = draft.survey, {each.path for each in draft.before.memories.values()}
    if chosen is not None:
        folder, base = posixpath.split(chosen)
        if folder not in survey.names:
            raise NotFoundError(f"there is no folder {folder} for {chosen}", "make the folder first")
        if base in survey.names[folder] or chosen in known or chosen in draft.made:
            raise ExistsError(f"{chosen} exists already", "choose another name with --memory-file")
        return chosen
    root, _ = draft.before.roots[draft.before.disks[0]]
    folder, taken = posixpath.dirname(root), survey.names.get(posixpath.dirname(root), frozenset())
    for number in range(1, 100_000):
        ending = f".{label}.memory" if number == 1 else f".{label}-{number}.memory"
        room = max(240 - len(ending.encode(errors="surrogateescape")), 8)
        stem = draft.before.machine.encode(errors="surrogateescape")[:room].decode(errors="ignore")
        path = posixpath.join(folder, stem + ending)
        if stem + ending not in taken and path not in known:
            return path
    raise ExistsError(f"no free name for a memory file in {folder}")


def or_else(plan: Plan, draft: Draft, without: Tree) -> Plan:
    """The plan that leaves the tree ``without`` the snapshot when its memory could not be saved: the guest writes to
    the overlays by then, and what they stand on is loose."""
    # A memory that nothing refers to is not in it.
    other = diff(draft.before, settle(without, draft.outsiders))
    steps: list[Step] = [replace(each, otherwise=other) if isinstance(each, Record) else each for each in plan.steps]
    return replace(plan, steps=tuple(steps), seconds=plan.bytes_to_copy / SPEED)
