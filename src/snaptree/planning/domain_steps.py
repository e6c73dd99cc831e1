"""The steps that only a libvirt domain's plans have, and putting them into a plan."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from snaptree.planning.domain_memory_steps import DomainGoOver, going_on, gone_over_by_libvirt, saved_by_libvirt
from snaptree.planning.live_steps import LiveMerge, LiveSnapshot
from snaptree.planning.memory_steps import GoOver, SaveMemory

if TYPE_CHECKING:
    from snaptree.model.tree import Tree
    from snaptree.planning.plan import Plan
    from snaptree.planning.steps import Step


@dataclass(frozen=True, slots=True)
class WriteRecords:
    """Let libvirt's records, the domain's definition and its metadata say what the tree says.

    The tree is the one that is recorded when the step is taken, so that it can be taken any number of times.
    ``renamed`` are the names that a record had and has now, ``known`` the records that there were: one that has come
    since is somebody else's, and is not dropped. ``tips`` are the files that the disks began on: where the domain has
    others by now, and not those that it is to have, somebody has changed it since.
    """

    kind: ClassVar[str] = "write-records"
    crash: ClassVar[str] = (
        "some of libvirt's records say what they said before; the files that both need are there; recovery writes all "
        "of them again"
    )

    uri: str
    uuid: str
    renamed: tuple[tuple[str, str], ...] = ()
    known: tuple[str, ...] = ()
    tips: tuple[tuple[str, str], ...] = ()

    @property
    def summary(self) -> str:
        return "tell libvirt: its records and the domain's definition"


@dataclass(frozen=True, slots=True)
class DomainSnapshot(LiveSnapshot):
    """Have libvirt let a running domain's disks go on in their new overlays, all at one instant.

    Or after an internal snapshot on all disks, with which libvirt saves the memory, and of which it writes a record.
    """

    kind: ClassVar[str] = "domain-snapshot"
    crash: ClassVar[str] = (
        "the guest writes to the tips or to the overlays, on all disks alike; libvirt says which, also when it has "
        "stopped since, and overlays that it knows nothing of are removed; of internal snapshots, which it goes on "
        "taking by itself, it has a record, or they are removed"
    )

    uri: str = ""
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class DomainForget:
    """Have libvirt delete a running domain's internal snapshot, in all images (``paths``), with its record."""

    kind: ClassVar[str] = "domain-forget"
    crash: ClassVar[str] = (
        "some images have the internal snapshot still; libvirt has its record until none has; recovery has it go on"
    )

    uri: str
    uuid: str
    name: str
    paths: tuple[str, ...]

    @property
    def summary(self) -> str:
        return f"have libvirt delete the internal snapshot {self.name!r} in {', '.join(self.paths)}"


@dataclass(frozen=True, slots=True)
class DomainMerge(LiveMerge):
    """Have libvirt merge layers that a running domain has open, all disks at once."""

    kind: ClassVar[str] = "domain-merge"
    crash: ClassVar[str] = (
        "pull: the upper layer holds more clusters and shows the same; commit: the lower layer is half-merged and is "
        "read only through the one above; the job runs on, and recovery waits for it; when the domain has stopped the "
        "headers and its definition say how far it had come"
    )

    uri: str = ""
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Undefine:
    """Have libvirt forget a domain with its records, and with ``nvram`` its UEFI variables."""

    kind: ClassVar[str] = "undefine"
    crash: ClassVar[str] = "libvirt knows the domain or not; none of its disks is touched"

    uri: str
    uuid: str
    domain: str
    nvram: bool = False

    @property
    def summary(self) -> str:
        return f"have libvirt forget domain {self.domain}"


def with_records(plan: Plan, step: WriteRecords) -> Plan:
    """The plan that also tells libvirt, each time that the tree has changed for good.

    Before the point of no return nothing changes that libvirt's records speak of.
    """
    from snaptree.planning.steps import Record

    steps: list[Step] = []
    loaded: tuple[Step, ...] = ()
    told: Step | None = None
    for number, each in enumerate(plan.steps):
        steps.append(taken := _by_libvirt(each, step, plan))
        loaded = going_on(taken) if isinstance(taken, DomainGoOver) else loaded
        after = plan.steps[number + 1] if number + 1 < len(plan.steps) else None
        told = each if isinstance(each, Record) and number >= plan.point_of_no_return else told
        if told is not None and not isinstance(after, DomainForget):
            # Until libvirt has been told that a memory is nobody's any more, its guest does not write to the disks.
            steps += [step, *loaded]
            loaded, told = (), None
    # On the very tips that it has, which nothing was written to, there is nothing to tell.
    steps += loaded
    # What the first operation has written is known to those that follow.
    later = replace(
        step,
        renamed=(),
        known=tuple(sorted({*step.known, *plan.after.snapshots, *plan.after.branches})),
        tips=(*step.tips, *plan.paths_after.items()),
    )
    return replace(plan, steps=tuple(steps), then=tuple(with_records(each, later) for each in plan.then))


def forgotten_by_libvirt(plan: Plan, before: Tree, opened: Collection[str], step: WriteRecords) -> Plan:
    """The plan in which libvirt deletes the internal snapshots of the disks that a running domain is on.

    It deletes one on all disks together, and with its record: before that is dropped.

    :param opened: the images that its QEMU has open.
    """
    from snaptree.planning.steps import DeleteInternal, Record

    if any(isinstance(each, GoOver) for each in plan.steps):
        # The QEMU that has them open is gone by then.
        return plan
    tips = {before.layers[tip.layer].path for tip in before.active_branch.tips.values()} & set(opened)
    gone: list[DomainForget] = []
    for snapshot in before.snapshots.values():
        places = {before.layers[point.layer].path: point.internal for point in snapshot.points.values()}
        if snapshot.name not in plan.after.snapshots and set(places) <= tips and {*places.values()} == {snapshot.name}:
            gone.append(DomainForget(step.uri, step.uuid, snapshot.name, tuple(sorted(places))))
    done = {(path, each.name) for each in gone for path in each.paths}
    steps: list[Step] = []
    for each in plan.steps:
        if not (isinstance(each, DeleteInternal) and (each.path, each.tag) in done):
            steps.append(each)
        if isinstance(each, Record):
            steps += gone
            gone = []
    return replace(plan, steps=tuple(steps))


def _by_libvirt(each: Step, step: WriteRecords, plan: Plan) -> Step:
    """What a running QEMU would be told by its monitor, as libvirt does it."""
    if isinstance(each, LiveSnapshot):
        return DomainSnapshot(
            each.cuts, each.quiesce, each.agent, each.marks, each.firmware, uri=step.uri, uuid=step.uuid
        )
    if isinstance(each, SaveMemory):
        return saved_by_libvirt(each, plan.after, step.uri, step.uuid)
    if isinstance(each, GoOver):
        return gone_over_by_libvirt(each, plan.after, step.uri, step.uuid)
    if isinstance(each, LiveMerge):
        return DomainMerge(each.jobs, uri=step.uri, uuid=step.uuid)
    return each
