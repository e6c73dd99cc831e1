"""Memory: saving it with a snapshot or a branch that is parked, and what must hold before it is loaded."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from snaptree.errors import NoSpaceError, RefusedError, UnhealthyError, UsageError
from snaptree.model.branch import Branch
from snaptree.model.delta import diff
from snaptree.model.live import OFF, RUNNING
from snaptree.model.memory import BACKGROUND, Memory, Saveable
from snaptree.model.sizes import readable
from snaptree.model.snapshot import FirmwareFile, Snapshot
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning import firmware
from snaptree.planning.draft import Draft
from snaptree.planning.live_steps import Cut, Mark
from snaptree.planning.memory_steps import GoOver, Load, Save, SaveMemory
from snaptree.planning.plan import Plan
from snaptree.planning.sealing import require_keys
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
    if request.exclude:
        raise RefusedError(
            f"the guest goes on writing to {request.exclude[0]}, which would be newer than its memory of it",
            "leave out --exclude, or --memory",
        )
    if survey.live is None:
        raise RefusedError(f"machine {name} is off, and has no memory", "leave out --memory, or start it first")
    require_open(saveable(survey))


def _require_free_tpm(draft: Draft, name: str) -> None:
    """Refuse to load memory beside a QEMU that has a TPM: its emulator has the state open, and serves one QEMU alone.

    :raise RefusedError: one runs.
    """
    if draft.survey.live is not None and "tpm" in draft.survey.firmware:
        machine = draft.before.machine
        hint = f"stop it first: 'snaptree stop {machine}' (a snapshot with --memory keeps what it does now)"
        raise RefusedError(f"the TPM of {machine} serves one QEMU alone: none can load {name!r} beside it", hint)


def saveable(survey: Survey) -> Saveable:
    """What was read of the running machine's memory."""
    assert survey.live is not None and survey.live.memory is not None, "it is read for every request that saves memory"
    return survey.live.memory


def require_open(found: Saveable) -> None:
    """Refuse memory that QEMU cannot save.

    :raise RefusedError: a device is in the way.
    """
    if found.obstacle:
        hint = "leave the memory out, or see to that first"
        raise RefusedError(f"the memory cannot be saved: {found.obstacle}", hint)


def forms_waited_for(found: Saveable) -> tuple[str, ...]:
    """The forms in which memory is saved that is parked: all of it before another guest goes on.

    :raise RefusedError: it cannot be: only a guest that sleeps is saved in the background alone.
    """
    forms = tuple(each for each in found.forms if each != BACKGROUND)
    if not forms:
        hint = "wake it up first, or leave the memory alone with --no-memory"
        raise RefusedError("the guest sleeps, and could not be woken up any more if its memory were parked", hint)
    return forms


def save(draft: Draft, cuts: tuple[Cut, ...], marks: tuple[Mark, ...], label: str, chosen: str | None) -> Memory:
    """Save the machine's memory in the same instant in which its disks are frozen.

    :param chosen: where the user wants the file.
    """
    memory, found = new_memory(draft, label, chosen), saveable(draft.survey)
    keeps = firmware.kept(draft)
    draft.prepare.append(SaveMemory(cuts, memory.path, _like(draft), found.forms, found.used, marks, keeps))
    background = found.forms[0] == BACKGROUND
    draft.pause = PAUSE_SECONDS if background else found.used / SPEED
    if not (background or draft.survey.libvirt):
        why = "its QEMU does not save in the background, or is older than 8.1"
        draft.notes.append(f"the guest waits while its memory is saved, some {draft.pause:.1f} s: {why}")
    return memory


def require_within(tree: Tree, survey: Survey, request: SnapshotRequest) -> None:
    """Refuse an internal snapshot of a running domain that libvirt does not take: it takes one of all disks, with the
    memory, under the snapshot's own name.

    :raise UsageError: the request contradicts itself.
    :raise RefusedError: a disk, a name or the firmware is in the way.
    """
    hint = f"take it external (without --internal), or shut it down first: 'virsh shutdown {tree.machine}'"
    if request.memory_file is not None:
        raise UsageError("libvirt keeps the memory of an internal snapshot within an image", "leave out --memory-file")
    if request.quiesce:
        raise UsageError("--quiesce is for snapshots without memory, which libvirt saves with internal ones", hint)
    if request.files:
        raise RefusedError("libvirt takes an internal snapshot of a running domain on all disks, within them", hint)
    for disk, tip in sorted(tree.active_branch.tips.items()):
        if tree.layers[tip.layer].format != "qcow2":
            raise RefusedError(f"{disk} is raw, and libvirt takes internal snapshots of a running domain on all", hint)
    if request.name.isdigit():
        raise RefusedError(f"{request.name!r} is a number, which QEMU takes for another one's", "choose another name")
    if survey.firmware:
        raise RefusedError("libvirt takes no internal snapshots of a running domain with UEFI variables", hint)


def save_within(draft: Draft, marks: Sequence[Mark], name: str) -> None:
    """Let there be room for the memory that libvirt saves within an image.

    :raise RefusedError: an image has something of that name.
    """
    found = saveable(draft.survey)
    for mark in marks:
        if mark.tag != name:
            raise RefusedError(f"{mark.path} has an internal snapshot {name!r} already", "choose another name")
        identity = draft.facts(draft.before.active_branch.tips[mark.disk].layer).identity
        if identity is not None:
            draft.needs.setdefault(identity.device, found.used + DEVICES_BYTES)
    draft.pause += found.used / SPEED
    draft.extra += found.used
    draft.notes.append("libvirt saves the memory with it, within an image")


def _like(draft: Draft) -> str:
    """The file whose owner a memory file gets: a tip that the guest writes to."""
    active = draft.before.active_branch.tips
    return draft.before.layers[active[min(active)].layer].path


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
        state=RUNNING if found.asleep else survey.live.state,
    )
    draft.tree = replace(draft.tree, memories={**draft.tree.memories, memory.id: memory})
    draft.bytes += found.used
    draft.extra += found.used
    tips = draft.before.active_branch.tips.values()
    if any(draft.facts(each.id).encrypted for tip in tips for each in draft.before.chain(tip.layer)):
        draft.notes.append(f"{path} is not encrypted: what the guest has in its memory can be read there")
    return memory


def _new_path(draft: Draft, label: str, chosen: str | None) -> str:
    if chosen is not None:
        draft.take_path(chosen, "--memory-file")
        return chosen
    folder = posixpath.dirname(draft.beside(draft.before.disks[0]))
    return draft.free_path(folder, draft.before.machine, label, ".memory", "memory file")


def or_else(plan: Plan, draft: Draft, without: Tree) -> Plan:
    """The plan that leaves the tree ``without`` the snapshot when its memory could not be saved: the guest writes to
    the overlays by then, and what they stand on is loose."""
    # A memory that nothing refers to is not in it.
    other = diff(draft.before, settle(without, draft.outsiders))
    steps: list[Step] = [replace(each, otherwise=other) if isinstance(each, Record) else each for each in plan.steps]
    return replace(plan, steps=tuple(steps), seconds=plan.bytes_to_copy / SPEED)


# ---- going back to memory -----------------------------------------------------------------------------------------


class Moves(Struct, frozen=True):
    """What going elsewhere does with memory: what is loaded, whether that of now is saved, and what the machine does
    afterwards."""

    loads: Memory | None
    saves: bool
    after: str


def moves(
    tree: Tree, state: str, target: Snapshot | Branch, *, wanted: bool | None, power: str | None, drops: bool
) -> Moves | None:
    """What going to a snapshot or a branch does with memory; ``None`` when there is none in it.

    The memory of now is saved when the work of now is parked on the way to something that has memory, or as wanted.

    :param state: what the machine does now.
    :param wanted: whether the user wants memory; ``None`` when nothing was said.
    :param power: what the machine is to do afterwards, if that was said: otherwise what it did when the memory was
        saved, or what it does now.
    :param drops: the work of now is not parked.
    """
    held = tree.memories.get(target.memory) if target.memory is not None and wanted is not False else None
    after = power or (held.state if held is not None else state)
    loads = held if after != OFF else None
    saves = state != OFF and not drops and (wanted is True or (wanted is None and held is not None))
    return Moves(loads, saves, after) if loads is not None or saves else None


def require_loadable(draft: Draft, name: str, memory: Memory, extra: Collection[str]) -> None:
    """Refuse to go back to a memory that cannot be loaded, before anything is touched.

    :param extra: disks that the machine would have besides those that are of the same instant as the memory.
    :raise UnhealthyError: its file is not what was written.
    :raise RefusedError: the machine cannot be started by us, or has other disks.
    """
    wrong = draft.survey.memories.get(memory.id)
    without = "go back without the memory: --no-memory"
    if wrong:
        raise UnhealthyError(
            f"cannot go back to the memory of {name!r}: {wrong}", f"put it back as it was, or {without}"
        )
    if draft.survey.start is None:
        machine = draft.before.machine
        hint = f"store how: snaptree set {machine} --start 'qemu-system-x86_64 -m 2048 …', or {without}"
        raise RefusedError(f"machine {machine} has no start command, without which its memory cannot be loaded", hint)
    if extra:
        other = min(extra)
        raise RefusedError(f"the memory of {name!r} knows nothing of disk {other}", f"detach it first, or {without}")
    _require_free_tpm(draft, name)


def go_over(draft: Draft, found: Moves, saved: Memory | None, state: tuple[FirmwareFile, ...]) -> None:
    """Let the machine go over to what the tree in the making says, with memory.

    :param saved: the memory of now, which is still to be saved.
    :param state: the firmware's state there.
    """
    survey, tree = draft.survey, draft.tree
    save = load = None
    if saved is not None:
        save = Save(saved.path, _like(draft), forms_waited_for(saveable(survey)), saved.size)
        draft.pause = saved.size / SPEED
    if found.loads is not None:
        assert survey.start is not None
        for tip in tree.active_branch.tips.values():
            require_keys(draft, tree.chain(tip.layer), "start the machine anew")
        disks = {
            disk: tuple((each.id, each.path, each.format) for each in tree.chain(tip.layer))
            for disk, tip in sorted(tree.active_branch.tips.items())
        }
        beside = survey.start.monitor.removesuffix(".sock") + ".next.sock"
        start, pieces = survey.start, firmware.returning(draft, state)
        load = Load(start.command, start.folder, beside, disks, found.loads, pieces)
        draft.notes.append(f"the machine goes on from the instant of {found.loads.path}, and is {found.after} then")
    else:
        # No QEMU runs between.
        firmware.put_back(draft, state)
    draft.prepare.append(GoOver(survey.monitor, found.after, load, save, firmware.kept(draft)))
