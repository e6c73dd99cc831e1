"""Reading everything that a plan rests on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from msgspec.structs import replace

from snaptree.errors import SnaptreeError, UnhealthyError
from snaptree.images import durable, gate, memory_file, small
from snaptree.images.facts import read_facts
from snaptree.images.inode import is_still
from snaptree.machines.power import Power, own_monitor
from snaptree.model.layer import LayerId, Point
from snaptree.model.live import OFF
from snaptree.model.machine import STANDALONE, MachineConfig
from snaptree.model.survey import FileSystemFacts, LayerFacts, Outsider, PointFacts, RowFacts, Start, Stray, Survey
from snaptree.model.tree import Tree
from snaptree.paths import device_at
from snaptree.planning.plan import Plan
from snaptree.planning.unmeasured import Unmeasured
from snaptree.running.holding import written_by
from snaptree.store import operations, trees
from snaptree.store.database import Database

READS = 5
"""So often the tables of an image are read anew that a guest writes to meanwhile."""


def read_survey(
    database: Database,
    config: MachineConfig,
    tree: Tree,
    folders: Iterable[str] = (),
    *,
    beside: bool = True,
    power: Power | None = None,
) -> Survey:
    """Read the machine's layers and what surrounds them.

    :param folders: folders besides the layers' own that new files may go to.
    :param beside: also look for overlays in the layers' folders that the tree does not know.
    :param power: what the machine does; off without it.
    """
    facts = {layer.id: _facts_of(tree, layer.id) for layer in tree.layers.values()}
    places = sorted({os.path.dirname(layer.path) for layer in tree.layers.values()} | set(folders))
    return Survey(
        layers=facts,
        file_systems=_file_systems(facts.values()),
        outsiders=_outsiders(database, config, tree, facts, beside=beside),
        strays=_strays(database, tree) if beside else (),
        names=_names(places),
        running=power is not None and power.state != OFF,
        live=power.live if power is not None else None,
        now=time.time(),
        firmware=dict(config.firmware),
        firmware_changed=_firmware_changed(config, tree),
        agent=config.agent,
        keep=os.path.join(database.folder, "firmware"),
        token=os.urandom(6).hex(),
        bytes_per_second=_speed(database, config.name),
        free=_free(places),
        start=_start(database, config),
        monitor=own_monitor(database, config.name),
        busy=_busy(database, tree),
        keys=frozenset(luks for luks, path in config.keys.items() if os.path.isfile(path) and os.access(path, os.R_OK)),
        memories={each.id: wrong for each in tree.memories.values() if (wrong := memory_file.ailment(each))},
    )


def _busy(database: Database, tree: Tree) -> frozenset[LayerId]:
    paths: set[str] = set()
    # Under whichever name the machine is kept.
    for operation in operations.unfinished(database):
        begun = operations.steps_of(database, operation.id)[: operation.step + 1]
        paths.update(path for step in begun for path in written_by(step))
    return frozenset(layer.id for layer in tree.layers.values() if layer.path in paths)


def _firmware_changed(config: MachineConfig, tree: Tree) -> bool:
    parent = tree.active_branch.parent
    live = dict(config.firmware)
    copies = tree.snapshots[parent].firmware if parent is not None and live else ()
    # What may not be read may not be copied either: an operation that had to is refused.
    with suppress(OSError):
        return any(each.role in live and not small.same(live[each.role], each.path) for each in copies)
    return False


def _facts_of(tree: Tree, number: LayerId) -> LayerFacts:
    layer = tree.layers[number]
    facts = read_facts(layer.path, layer.format)
    folder, name = os.path.split(layer.path)
    if os.path.realpath(folder) != folder:
        # Links were followed when it was added; one that has come since may lead anywhere.
        there = os.path.join(os.path.realpath(folder), name)
        facts = replace(facts, problem="changed", detail=f"{layer.path} leads through a symbolic link to {there} now")
    if facts.backing is None:
        return facts
    parent = tree.layers[layer.parent].path if layer.parent is not None else None
    try:
        backing = gate.resolve_backing(layer.path, facts.backing)
    except SnaptreeError as error:
        return replace(facts, problem=facts.problem or "changed", detail=facts.detail or error.message)
    device = device_at(backing)
    # By whatever name: it is the device that the tree knows as long as that has this number.
    same = parent is not None and device is not None and device == device_at(parent)
    return replace(facts, backing=parent if same else backing)


def _file_systems(facts: Iterable[LayerFacts]) -> dict[int, FileSystemFacts]:
    found: dict[int, FileSystemFacts] = {}
    for each in facts:
        if each.identity is None or each.identity.device in found:
            continue
        try:
            status = os.statvfs(each.path)
        except OSError:
            continue
        free = status.f_bavail if os.geteuid() else status.f_bfree
        found[each.identity.device] = FileSystemFacts(each.identity.device, free * status.f_frsize)
    return found


def _start(database: Database, config: MachineConfig) -> Start | None:
    if config.start is None:
        return None
    return Start(config.start, config.folder or "/", own_monitor(database, config.name))


def _free(folders: Iterable[str]) -> dict[str, int]:
    """How much room there is for us in each folder, in bytes."""
    found: dict[str, int] = {}
    for folder in folders:
        with suppress(OSError):
            status = os.statvfs(folder)
            found[folder] = (status.f_bavail if os.geteuid() else status.f_bfree) * status.f_frsize
    return found


def _outsiders(
    database: Database, config: MachineConfig, tree: Tree, facts: dict[LayerId, LayerFacts], *, beside: bool
) -> tuple[Outsider, ...]:
    """What stands on owned layers from outside: other machines that were added, and overlays beside the layers."""
    owned = {layer.path: layer for layer in tree.layers.values() if layer.owned}
    found: dict[tuple[LayerId, str], Outsider] = {}
    # What is remembered of a domain may be long gone: libvirt is asked instead.
    old = trees.names(database, config.provider) if config.provider != STANDALONE else ()
    for machine, path in trees.others_on(database, tree.machine, tuple(owned)):
        if machine in old:
            continue
        layer = owned[path]
        found[layer.id, machine] = Outsider(layer.id, f"machine {machine!r}")
    if not beside:
        return tuple(found.values())
    inodes = {
        (each.identity.device, each.identity.inode): number
        for number, each in facts.items()
        if each.identity is not None and tree.layers[number].owned
    }
    mine = {layer.path for layer in tree.layers.values()}
    # What an operation that is under way has made stands on nothing yet.
    busy = {each.id for each in operations.unfinished(database)}
    made = {claim.path for number in busy for claim in operations.claims_of(database, number)}
    folders = sorted({os.path.dirname(path) for path in owned})
    for overlay, backing in gate.find_overlays(folders, set(inodes)):
        if overlay in mine or overlay in made:
            continue
        try:
            status = os.stat(backing)
        except OSError:
            continue
        number = inodes.get((status.st_dev, status.st_ino))
        if number is not None:
            found[number, overlay] = Outsider(number, overlay)
    return tuple(found.values())


def _strays(database: Database, tree: Tree) -> tuple[Stray, ...]:
    """Files that the journal says snaptree made beside this machine's layers, and that no tree knows."""
    folders = {os.path.dirname(layer.path) for layer in tree.layers.values() if layer.owned}
    busy = {operation.id for operation in operations.unfinished(database)}
    found: list[Stray] = []
    for claim in operations.claims_left(database):
        if os.path.dirname(claim.path) not in folders or trees.owners_of(database, claim.path):
            continue
        try:
            same, allocated = is_still(claim.path, claim.generation, claim.inode), os.lstat(claim.path).st_blocks * 512
        except OSError:
            continue
        if same and not busy:
            found.append(Stray(claim.path, claim.generation, claim.inode, allocated, made=True))
    return tuple(found)


def _names(folders: Iterable[str]) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for folder in folders:
        try:
            found[folder] = frozenset(os.listdir(folder))
        except OSError:
            continue
    return found


def _speed(database: Database, machine: str) -> float:
    """Bytes a second over the machine's latest merges of more than 64 MiB; 0 when there was none."""
    merges = [
        each
        for each in operations.history(database, machine)
        if each.bytes > 1 << 26 and each.ended is not None and each.state == operations.DONE
    ][-5:]
    seconds = sum((each.ended or each.started) - each.started for each in merges)
    return sum(each.bytes for each in merges) / seconds if seconds > 0 else 0.0


def planned(tree: Tree, survey: Survey, make: Callable[[Survey], Plan]) -> Plan:
    """The plan that is made on the survey; what it needs to know besides is read on the way."""
    while True:
        try:
            return make(survey)
        except Unmeasured as wanted:
            survey = measure(tree, survey, wanted)


def measure(tree: Tree, survey: Survey, wanted: Unmeasured) -> Survey:
    """The survey with the figures of these rows and points."""
    from snaptree.images.mover.cost import foreseen_point

    figures: dict[tuple[LayerId, ...], RowFacts] = dict(survey.rows)
    points: dict[Point, PointFacts] = dict(survey.points)
    for row in wanted.rows:
        layers = [(tree.layers[each].path, tree.layers[each].format) for each in row]
        below = [(each.path, each.format) for each in list(tree.chain(row[0]))[1:]]
        try:
            with durable.explained(layers[-1][0], "read the tables of"):
                figures[row] = _counted(layers, below, again=READS if _is_written(survey, row) else 0)
        except UnhealthyError as error:
            if _is_written(survey, row):
                # A guest writes to it: its tables do not stand still while they are read.
                figures[row] = _roughly(survey, row)
                continue
            # The row cannot be merged; the rest of the plan can go on without it.
            figures[row] = RowFacts(0, 0, 0, 0, 0)
            worst = replace(survey.layers[row[0]], problem="damaged", detail=error.message)
            survey = replace(survey, layers={**survey.layers, row[0]: worst})
    for point in wanted.points:
        assert point.internal is not None
        path = tree.layers[point.layer].path
        with durable.explained(path, "read the tables of"):
            points[point] = foreseen_point(path, point.internal)
    return replace(survey, rows=figures, points=points)


def _is_written(survey: Survey, row: tuple[LayerId, ...]) -> bool:
    return survey.live is not None and row[-1] in survey.live.open


def _counted(layers: Sequence[tuple[str, str]], below: Sequence[tuple[str, str]], *, again: int) -> RowFacts:
    """What the tables say; they are read ``again`` so often where they make no sense."""
    from snaptree.images.mover.cost import foreseen

    for _ in range(again):
        with suppress(UnhealthyError):
            return foreseen(layers, below)
        time.sleep(0.02)
    return foreseen(layers, below)


def _roughly(survey: Survey, row: tuple[LayerId, ...]) -> RowFacts:
    """What a merge may move at the most, by what the files occupy; an estimate.

    Whether blocks can be shared has not been found out.
    """
    room = [survey.layers[each].allocated for each in row]
    down, up = sum(room[1:]), sum(room[:-1])
    unknown = f"the tables of {survey.layers[row[-1]].path} change while they are read"
    return RowFacts(down, 0, down, up, up, unshared=unknown)
