"""The workshop in which a verb puts a plan together: a tree that changes, and the steps that make it so."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from snaptree.errors import ExistsError, NoSpaceError, NotFoundError, RefusedError
from snaptree.model.delta import diff
from snaptree.model.layer import Layer, LayerId, Point
from snaptree.model.sizes import readable
from snaptree.model.survey import LayerFacts, PointFacts, Survey
from snaptree.model.tree import MAX_CHAIN, Tree
from snaptree.planning.clearing import cleared
from snaptree.planning.health import Ailment, ailments, require_whole
from snaptree.planning.live_steps import LiveOpen
from snaptree.planning.memory_steps import GoOver
from snaptree.planning.plan import Plan
from snaptree.planning.sealing import LUKS_BYTES, seal, seal_point
from snaptree.planning.settle import is_frozen, settle, with_moved_roots
from snaptree.planning.steps import (
    BuildFromPoint,
    DeleteInternal,
    File,
    MakeOverlay,
    Record,
    Step,
    Unlink,
)
from snaptree.planning.unmeasured import Unmeasured

OVERLAY_BYTES = 262_144
"""What an empty overlay occupies at the most with the usual 64 KiB clusters: header, refcounts, L1."""


class Draft:
    """A plan in the making.

    ``prepare`` are steps that can be undone, before the tree changes; ``finish`` are those that follow the change.

    :param chosen: paths that the user chose for new layers, by disk.
    :param sick: what is wrong with layers, where the tree is not the one that was surveyed any more.
    """

    def __init__(
        self,
        tree: Tree,
        survey: Survey,
        chosen: Mapping[str, str] | None = None,
        *,
        sick: Mapping[LayerId, Ailment] | None = None,
    ) -> None:
        self.before = tree
        self.tree = tree
        self.survey = survey
        self.prepare: list[Step] = []
        self.finish: list[Step] = []
        self.notes: list[str] = []
        self.touches: set[str] = set()
        self.made: set[str] = set()
        self.sealed: dict[LayerId, str] = {}
        """The LUKS ids of new layers that are encrypted."""
        self.spared: set[LayerId] = set()
        self.fresh: frozenset[LayerId] = frozenset()
        """Layers that an operation before this one makes, which nobody has read."""
        self.extra = 0
        self.pause = 0.0
        self.needs: dict[int, int] = {}
        self.bytes = 0
        self.chosen = dict(chosen or {})
        self.outsiders = frozenset(each.layer for each in survey.outsiders)
        self.ailments: Mapping[LayerId, Ailment] = ailments(tree, survey) if sick is None else sick
        for disk in self.chosen:
            if disk not in tree.roots:
                raise NotFoundError(f"machine {tree.machine} has no disk {disk}", f"its disks: {', '.join(tree.roots)}")

    # ---- facts ----------------------------------------------------------------------------------------------------

    def facts(self, layer: LayerId) -> LayerFacts:
        """What was read of the layer; for one that was not read, what the tree knows."""
        found = self.survey.layers.get(layer)
        if found is not None:
            return found
        known = self.tree.layers.get(layer) or self.before.layers[layer]
        found = LayerFacts(
            path=known.path, format=known.format, virtual_size=known.virtual_size, identity=known.identity
        )
        return replace(found, encrypted=True, luks=self.sealed[layer]) if layer in self.sealed else found

    def files(self, row: Iterable[LayerId]) -> tuple[File, ...]:
        """The files of these layers."""
        return tuple((self.tree.layers[each].path, self.tree.layers[each].format) for each in row)

    def files_below(self, layer: LayerId) -> tuple[File, ...]:
        """The chain that the layer stands on, nearest first."""
        return self.files(each.id for each in list(self.tree.chain(layer))[1:])

    def is_open(self, layer: LayerId) -> bool:
        """Whether the machine's QEMU has the layer open."""
        return self.survey.live is not None and layer in self.survey.live.open

    def is_busy(self, layer: LayerId) -> bool:
        """Whether a guest writes to the layer: nobody can say then that it has not."""
        return self.is_open(layer) and is_tip(self.before, layer)

    def unwritten(self, layer: LayerId) -> bool:
        """Whether nothing has been written to the overlay since it was made. A guest's tip counts as written."""
        if self.is_busy(layer):
            return False
        facts, known = self.survey.layers.get(layer), self.tree.layers[layer]
        if facts is None or facts.written or known.parent is None or known.half_merged:
            return False
        parent = self.tree.layers[known.parent]
        return facts.virtual_size == parent.virtual_size and not parent.half_merged

    def require_whole(self, layer: LayerId, purpose: str) -> None:
        """Refuse to build on an unhealthy chain."""
        require_whole(self.tree, self.ailments, layer, purpose)

    # ---- new layers -----------------------------------------------------------------------------------------------

    def new_path(self, disk: str, label: str) -> str:
        """A path for a new file of the disk: the one that the user chose, or one beside the disk's root.

        Beside a block device nothing can be kept: what stands on one goes where the user has put the first.

        :raise ExistsError: the chosen file exists.
        :raise NotFoundError: the chosen folder does not.
        :raise RefusedError: the disk is a block device, and nobody has said where to.
        """
        chosen = self.chosen.pop(disk, None)
        if chosen is not None:
            self.take_path(chosen, "--file")
            if not chosen.endswith(".qcow2"):
                raise RefusedError(f"{chosen} does not end in .qcow2, which new layers are", "name it NAME.qcow2")
            return chosen
        folder, base = posixpath.split(self.beside(disk))
        stem = base.rsplit(".", 1)[0] if "." in base[1:] else base
        return self.free_path(folder, stem, label, ".qcow2", "layer")

    def beside(self, disk: str) -> str:
        """The path that new files of the disk are put beside, and named after.

        :raise RefusedError: the disk is a block device, and none of its layers is a file.
        """
        root = self.before.roots[disk][0]
        layers = [each for each in self.tree.layers.values() if each.disk == disk]
        if not any(each.path == root and self.facts(each.id).block_device for each in layers):
            return root
        files = [each for each in layers if each.owned and not self.facts(each.id).block_device]
        if not files:
            raise RefusedError(
                f"{root} is a block device, beside which no file can be kept",
                f"say where to with --file {disk}=FOLDER/NAME.qcow2; later ones are put beside that",
            )
        return posixpath.join(posixpath.dirname(min(files, key=lambda each: each.id).path), posixpath.basename(root))

    def take_path(self, chosen: str, option: str) -> None:
        """See that a new file can have the path that the user chose with the option, and keep it for that.

        :raise ExistsError: there is one.
        :raise NotFoundError: there is no such folder.
        """
        folder, base = posixpath.split(chosen)
        if folder not in self.survey.names:
            raise NotFoundError(f"there is no folder {folder} for {chosen}", "make the folder first")
        if base in self.survey.names[folder] or chosen in self.made or chosen in self._known():
            raise ExistsError(f"{chosen} exists already", f"choose another name with {option}")
        self.made.add(chosen)

    def free_path(self, folder: str, stem: str, label: str, suffix: str, what: str) -> str:
        """A path for a new file that nobody has yet, ``STEM.LABEL`` with the suffix and perhaps a number."""
        taken, known = self.survey.names.get(folder, frozenset()), self._known()
        for number in range(1, 100_000):
            ending = f".{label}{suffix}" if number == 1 else f".{label}-{number}{suffix}"
            room = 240 - len(ending.encode(errors="surrogateescape"))
            name = stem.encode(errors="surrogateescape")[: max(room, 8)].decode(errors="ignore") + ending
            path = posixpath.join(folder, name)
            if name not in taken and path not in self.made and path not in known:
                self.made.add(path)
                return path
        raise ExistsError(f"no free name for a new {what} in {folder}")

    def _known(self) -> set[str]:
        """The paths of the tree's files. That of one that is missing just now stays its own."""
        layers = {layer.path for layer in self.before.layers.values()}
        return layers | {memory.path for memory in self.before.memories.values()}

    def stack(self, parent: LayerId, label: str, purpose: str) -> Layer:
        """A new empty overlay on the layer, added to the tree.

        :raise UnhealthyError: something is wrong with the chain beneath.
        :raise RefusedError: the chain would be too deep.
        """
        self.require_whole(parent, purpose)
        below = self.tree.layers[parent]
        if below.half_merged:
            lost = " ".join(sorted(self.tree.snapshots_on(parent)))
            verb = f"delete {self.tree.machine} {lost}" if lost else f"gc {self.tree.machine}"
            raise RefusedError(
                f"cannot {purpose}: {below.path} is half-merged", f"finish the merge with 'snaptree {verb}'"
            )
        chain = list(self.tree.chain(parent))
        if len(chain) >= MAX_CHAIN:
            oldest = next(
                (name for each in reversed(chain) for name in self.tree.names_on.get(Point(each.id), ())),
                None,
            )
            raise RefusedError(
                f"cannot {purpose}: the chain under {below.disk} has {len(chain)} layers already",
                f"delete a snapshot first, for instance {oldest!r}" if oldest else "merge some with 'snaptree squash'",
            )
        like = below if below.owned else self._owner_like(below.disk)
        luks = seal(self, parent, self.facts(like.id), purpose)
        path = self.new_path(below.disk, label)
        self._make_overlay(path, below, below.virtual_size, like.path, self.facts(parent), luks)
        return self._add(below.disk, path, parent, below.virtual_size, luks)

    def twin(self, layer: LayerId, purpose: str) -> str:
        """The path of a new empty overlay on what the layer stands on, with its options and a name like its own.

        :raise UnhealthyError: something is wrong with the chain.
        """
        known = self.tree.layers[layer]
        self.require_whole(layer, purpose)
        luks = seal(self, layer, self.facts(layer), purpose)
        assert known.parent is not None
        below = self.tree.layers[known.parent]
        folder, base = posixpath.split(known.path)
        stem, _, label = base.removesuffix(".qcow2").partition(".")
        front, _, number = label.rpartition("-")
        label = front if front and number.isdigit() else label
        path = self.free_path(folder, stem or "disk", label or "tip", ".qcow2", "layer")
        self._make_overlay(path, below, known.virtual_size, known.path, self.facts(layer), luks)
        self.touches.add(known.path)
        return path

    def _make_overlay(
        self, path: str, below: Layer, size: int, like: str, options: LayerFacts, luks: LayerFacts | None
    ) -> None:
        """Have an empty overlay made that belongs to whom ``like`` belongs, with a layer's options.

        :param luks: the layer whose LUKS header it gets.
        """
        qcow2 = options.format == "qcow2"
        self.prepare.append(
            MakeOverlay(
                path=path,
                backing=below.path,
                backing_format=below.format,
                virtual_size=size,
                like=like,
                cluster_size=options.cluster_size if qcow2 else 65536,
                refcount_bits=options.refcount_bits if qcow2 else 16,
                lazy_refcounts=qcow2 and options.lazy_refcounts,
                extended_l2=qcow2 and options.extended_l2,
                compression=options.compression if qcow2 else "zlib",
                luks=luks.path if luks is not None else "",
            )
        )
        self.touches.add(below.path)
        self.extra += OVERLAY_BYTES + (LUKS_BYTES if luks is not None else 0)

    def build(self, point: Point, label: str, purpose: str) -> Layer:
        """A new layer made out of an internal snapshot, on the same backing file, added to the tree.

        A guest may write to the source meanwhile: what an internal snapshot refers to stays as it is, where it is.
        """
        assert point.internal is not None
        source = self.tree.layers[point.layer]
        self.require_whole(source.id, purpose)
        facts = self.facts(source.id)
        size = next((each.virtual_size for each in facts.internals if each.name == point.internal), source.virtual_size)
        luks = seal_point(self, point, size, purpose)
        found = self.survey.points.get(point)
        if found is None and source.id in self.survey.layers:
            raise Unmeasured(points=(point,))
        # Of a layer that is only just being made nothing has been read yet.
        found = found or PointFacts(min(facts.allocated, size), OVERLAY_BYTES, by_qemu="it is only just being made")
        if luks is not None and not found.by_qemu:
            found = replace(found, by_qemu=f"{luks.path}, beneath, is encrypted")
        if found.by_qemu and size != source.virtual_size and self.is_open(source.id):
            # For that it takes a copy of the whole file, which has to stand still.
            raise RefusedError(
                f"machine {self.before.machine} is running, and the internal snapshot {point.internal!r} in "
                f"{source.path} is of another size than the disk is now, and has to be copied by QEMU: {found.by_qemu}",
                f"stop it first: 'snaptree stop {self.before.machine}'",
            )
        path = self.new_path(source.disk, label)
        beside = posixpath.dirname(path) == posixpath.dirname(source.path)
        shares = beside and not (found.by_qemu or found.unshared)
        copied = found.share_bytes if shares else found.bytes
        self.prepare.append(
            BuildFromPoint(
                path=path,
                source=source.path,
                tag=point.internal,
                below=self.files_below(source.id),
                virtual_size=size,
                bytes=copied,
                cluster_size=facts.cluster_size,
                shared=found.bytes - copied,
                by_qemu=found.by_qemu,
                luks=luks.path if luks is not None else "",
            )
        )
        self.touches.add(source.path)
        need = copied + found.tables + OVERLAY_BYTES + (LUKS_BYTES if luks is not None else 0)
        self.extra += need
        self.bytes += copied
        if facts.identity is not None and beside:
            device = facts.identity.device
            self.needs[device] = self.needs.get(device, 0) + need
        return self._add(source.disk, path, source.parent, size, luks)

    def _owner_like(self, disk: str) -> Layer:
        """An owned file of the disk, to take owner and mode from when the layer below is foreign (it may be root's)."""
        tip = self.before.active_branch.tips.get(disk) if self.before.active in self.before.branches else None
        if tip is not None:
            return self.before.layers[tip.layer]
        return next(layer for layer in self.before.layers.values() if layer.disk == disk and layer.owned)

    def _add(self, disk: str, path: str, parent: LayerId | None, size: int, luks: LayerFacts | None) -> Layer:
        layer = Layer(
            id=max(self.tree.next_layer_id(), self.before.next_layer_id()),
            disk=disk,
            path=path,
            format="qcow2",
            parent=parent,
            owned=True,
            virtual_size=size,
            made=True,
        )
        self.tree = self.tree.with_layers(layer)
        if luks is not None:
            self.sealed[layer.id] = luks.luks
        return layer

    def new_tag(self, layer: LayerId, wanted: str) -> str:
        """A tag for a new internal snapshot of the layer that neither names nor numbers another one there.

        QEMU looks a tag up as a number first (``find_snapshot_by_id_or_name``), so that a tag of digits is ambiguous.
        """
        taken = set(self.tree.internals.get(layer, ())) | set(self.before.internals.get(layer, ()))
        for each in self.facts(layer).internals:
            taken |= {each.id, each.name}
        tag = f"snap-{wanted}" if wanted.isdigit() else wanted
        number = 2
        while tag in taken:
            tag = f"{wanted}~{number}"
            number += 1
        return tag

    def fork(self, disk: str, label: str, other: str, *, cuts: bool = False) -> tuple[Point, Point]:
        """Two tips that show what the active tip of the disk shows now: one to go on with, one to park.

        :param label: names the new file to go on with, ``other`` the one to park.
        :param cuts: a guest that writes to the tip is told to go on in the one.
        """
        if self.survey.live is not None and not cuts:
            name = self.before.machine
            raise RefusedError(
                f"machine {name} is running, and {disk} does not fork where it stands while it does",
                f"'snaptree snapshot {name} POINT', then 'snaptree branch {name} BRANCH --from POINT'",
            )
        tip = self.before.active_branch.tips[disk].layer
        parent = self.tree.layers[tip].parent
        if self.unwritten(tip) and parent is not None:
            return Point(tip), Point(self.stack(parent, other, f"fork {disk}").id)
        parked = self.stack(tip, other, f"fork {disk}")
        return Point(self.stack(tip, label, f"fork {disk}").id), Point(parked.id)

    # ---- the end --------------------------------------------------------------------------------------------------

    def conclude(self, operation: str, summary: str, what: str) -> Plan:
        """The plan: prepare, change the tree in one transaction, finish, clean up what nothing needs."""
        self._require_room(summary)
        after = with_moved_roots(self.before, settle(self.tree, self.outsiders))
        cleanup, freed = cleared(self, after)
        baseline = tuple(
            layer.id
            for layer in after.layers.values()
            if layer.owned and layer.identity is None and is_frozen(after, layer.id)
        )
        self._open_to_write(cleanup, after)
        delta = diff(self.before, after)
        change: list[Step] = [Record(delta, baseline, what)] if delta or baseline else []
        steps = (*self.prepare, *change, *self.finish, *cleanup)
        self.touches.update(step.path for step in steps if isinstance(step, Unlink | DeleteInternal))
        return Plan(
            operation=operation,
            summary=summary,
            steps=steps,
            point_of_no_return=len(self.prepare),
            after=after,
            bytes_to_copy=self.bytes,
            peak_extra_bytes=self.extra,
            frees_bytes=freed,
            paths_after=paths_of(after),
            notes=tuple(self.notes),
            touches=tuple(sorted(self.touches)),
            guest_pause=self.pause,
            estimate=self.survey.live is not None,
        )

    def _open_to_write(self, cleanup: Iterable[Step], after: Tree) -> None:
        """See that QEMU can write to what it only reads where it is to delete internal snapshots, before names go.

        After another QEMU has taken over it has none of these layers.
        """
        if any(isinstance(step, GoOver) for step in self.prepare):
            return
        read = {each.path for each in after.layers.values() if self.is_open(each.id) and not self.is_busy(each.id)}
        opened = dict.fromkeys(step.path for step in cleanup if isinstance(step, DeleteInternal) and step.path in read)
        live = self.survey.live
        for each in after.layers.values():
            if live is not None and each.path in opened and (job := live.backups.get(each.disk)):
                why = f"QEMU's backup job {job} copies {each.disk}, and nothing of it is reopened beside it"
                raise RefusedError(why, "wait until that has ended")
        if opened:
            self.prepare.append(LiveOpen(tuple(opened)))

    def _require_room(self, summary: str) -> None:
        """Refuse new layers with data that would not fit; empty ones hardly need room."""
        for device, need in self.needs.items():
            free = self.survey.file_systems[device].free if device in self.survey.file_systems else need
            if need > free:
                figures = f"it needs up to {readable(need)} of room, and the file system has {readable(free)}"
                raise NoSpaceError(f"cannot {summary}: {figures}", "free some room first")


def is_tip(tree: Tree, layer: LayerId) -> bool:
    """Whether a branch has the whole layer as its tip."""
    names = tree.names_on.get(Point(layer), ())
    return any(name in tree.branches and Point(layer) in tree.branches[name].tips.values() for name in names)


def paths_of(tree: Tree) -> dict[str, str]:
    """Where the active tip of each disk is."""
    return {disk: tree.layers[point.layer].path for disk, point in sorted(tree.active_branch.tips.items())}


def renamed_tip(tree: Tree, branch: str, disk: str, point: Point) -> Tree:
    """The tree with another tip of one disk of one branch."""
    line = tree.branches[branch]
    return tree.with_branches(replace(line, tips={**line.tips, disk: point}))
