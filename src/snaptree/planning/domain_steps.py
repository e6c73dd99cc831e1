"""The steps that only a libvirt domain's plans have, and putting them into a plan."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from snaptree.planning.domain_memory_steps import (
    DomainGoOver,
    DomainMemoryStep,
    going_on,
    gone_over_by_libvirt,
    saved_by_libvirt,
)
from snaptree.planning.live_steps import File, LiveMerge, LiveOpen, LiveSnapshot, frozen
from snaptree.planning.memory_steps import GoOver, SaveMemory

if TYPE_CHECKING:
    from snaptree.model.tree import Tree
    from snaptree.planning.plan import Plan
    from snaptree.planning.steps import Step


class WriteRecords(Struct, frozen=True):
    """Let libvirt's records, the domain's definition and its metadata say what the tree says.

    The tree is the one that is recorded when the step is taken, so that it can be taken any number of times.
    ``renamed`` are the names that a record had and has now, ``known`` the records that there were: one that has come
    since is somebody else's, and is not dropped. ``tips`` are the files that the disks began on: where the domain has
    others by now, and not those that it is to have, somebody has changed it since. ``going`` are internal snapshots
    (path and tag) that nothing shows any more and that are still there, ``cleared`` those that are not any more.
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
    going: tuple[tuple[str, str], ...] = ()
    cleared: tuple[tuple[str, str], ...] = ()

    @property
    def summary(self) -> str:
        return "tell libvirt: its records and the domain's definition"


class DomainSnapshot(LiveSnapshot, frozen=True):
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

    @property
    def summary(self) -> str:
        done = f"have libvirt {frozen(self.cuts, self.marks)} at one instant"
        if self.marks:
            return f"{done}, with the memory"
        how = " with the guest's file systems quiesced" if self.quiesce else ""
        return f"{done}{how}; the guest runs on"


class DomainForget(Struct, frozen=True):
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


class DomainMerge(LiveMerge, frozen=True):
    """Have libvirt merge layers that a running domain has open, all disks at once."""

    kind: ClassVar[str] = "domain-merge"
    crash: ClassVar[str] = (
        "pull: the upper layer holds more clusters and shows the same; commit: the lower layer is half-merged and is "
        "read only through the one above; the job runs on, and recovery waits for it; when the domain has stopped the "
        "headers and its definition say how far it had come"
    )

    uri: str = ""
    uuid: str = ""


class Over(Struct, frozen=True):
    """One disk of a domain that goes over to a file which was built beside.

    The guest writes to ``before``, a tip with little in it, and then to ``after``, an empty one that has what the
    other has by then. Both stand on the first of ``chain``, in which ``upper`` is what is replaced.
    """

    disk: str
    before: str
    after: str
    upper: str
    chain: tuple[File, ...]


class DomainSwap(Struct, frozen=True):
    """Have libvirt let a running domain go over to merged files that were built beside.

    What the guest has written to its tip is copied into another one, which stands on the same files by their names,
    but for what is merged; they are opened anew when the guest goes over. Just before, the merged files change names
    with those that they are built of.
    """

    kind: ClassVar[str] = "domain-swap"
    crash: ClassVar[str] = (
        "the path names the file of before or the merged one, the other has its hidden name, and what stands on it "
        "shows the same; the guest writes to the one overlay or to the other, which libvirt says, also when the domain "
        "has stopped since; until it writes to the other, recovery ends the copy and gives the files their names back"
    )

    overs: tuple[Over, ...]
    uri: str = ""
    uuid: str = ""

    @property
    def summary(self) -> str:
        return "have libvirt go over to what was built instead of " + ", ".join(each.upper for each in self.overs)


class Undefine(Struct, frozen=True):
    """Have libvirt forget a domain with its records, with ``nvram`` its UEFI variables, with ``tpm`` its TPM's."""

    kind: ClassVar[str] = "undefine"
    crash: ClassVar[str] = "libvirt knows the domain or not; none of its disks is touched"

    uri: str
    uuid: str
    domain: str
    nvram: bool = False
    tpm: bool = False

    @property
    def summary(self) -> str:
        return f"have libvirt forget domain {self.domain}"


LibvirtStep: TypeAlias = (
    DomainSnapshot | DomainMerge | DomainSwap | DomainMemoryStep | DomainForget | WriteRecords | Undefine
)
"""Those that libvirt takes."""


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
    # What an operation has written is known to those that follow.
    later = _afterwards(replace(step, renamed=()), plan)
    then: list[Plan] = []
    for following in plan.then:
        then.append(with_records(following, later))
        later = _afterwards(later, following)
    return replace(plan, steps=tuple(steps), then=tuple(then))


def _afterwards(step: WriteRecords, plan: Plan) -> WriteRecords:
    known = tuple(sorted({*step.known, *plan.after.snapshots, *plan.after.branches}))
    return replace(step, known=known, tips=tuple(dict.fromkeys((*step.tips, *plan.paths_after.items()))))


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
    # A name may go while what it named stays: it has another name now, or another snapshot has the same point.
    going = {(each.path, each.tag) for each in plan.steps if isinstance(each, DeleteInternal)}
    gone: list[DomainForget] = []
    for snapshot in before.snapshots.values():
        places = {before.layers[point.layer].path: point.internal for point in snapshot.points.values()}
        if set(places.items()) <= going and set(places) <= tips and {*places.values()} == {snapshot.name}:
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


def deferred(plan: Plan, opened: Collection[str]) -> tuple[Plan, tuple[tuple[str, str], ...]]:
    """The plan without the deletion of internal snapshots in what a running domain has open; and those, path and tag.

    libvirt has no call for it. Their names go all the same, and they go themselves when the domain is off.
    """
    from snaptree.planning.steps import DeleteInternal

    def waits(step: Step) -> bool:
        return isinstance(step, LiveOpen) or (isinstance(step, DeleteInternal) and step.path in opened)

    def without(each: Plan) -> Plan:
        late = [step for step in each.steps if isinstance(step, DeleteInternal) and waits(step)]
        notes = tuple(
            f"{step.path} keeps what {step.tag!r} had until the domain is off: gc does it then" for step in late
        )
        return replace(
            each,
            steps=tuple(step for step in each.steps if not waits(step)),
            point_of_no_return=each.point_of_no_return - sum(map(waits, each.steps[: each.point_of_no_return])),
            notes=(*each.notes, *notes),
            then=tuple(without(following) for following in each.then),
        )

    late = [step for each in plan.every() for step in each.steps if isinstance(step, DeleteInternal) and waits(step)]
    return without(plan), tuple((step.path, step.tag) for step in late)


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
    if isinstance(each, DomainSwap):
        return replace(each, uri=step.uri, uuid=step.uuid)
    return each
