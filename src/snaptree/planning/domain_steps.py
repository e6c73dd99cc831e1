"""The steps that only a libvirt domain's plans have, and putting them into a plan."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from snaptree.planning.live_steps import LiveMerge, LiveOpen, LiveSnapshot

if TYPE_CHECKING:
    from snaptree.planning.plan import Plan
    from snaptree.planning.steps import Step


@dataclass(frozen=True, slots=True)
class WriteRecords:
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


@dataclass(frozen=True, slots=True)
class DomainSnapshot(LiveSnapshot):
    """Have libvirt let a running domain's disks go on in their new overlays, all at one instant."""

    kind: ClassVar[str] = "domain-snapshot"
    crash: ClassVar[str] = (
        "the guest writes to the tips or to the overlays, on all disks alike; libvirt says which, also when it has "
        "stopped since, and overlays that it knows nothing of are removed"
    )

    uri: str = ""
    uuid: str = ""


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
    for number, each in enumerate(plan.steps):
        steps.append(_by_libvirt(each, step))
        if isinstance(each, Record) and number >= plan.point_of_no_return:
            steps.append(step)
    # What the first operation has written is known to those that follow.
    later = replace(
        step,
        renamed=(),
        known=tuple(sorted({*step.known, *plan.after.snapshots, *plan.after.branches})),
        tips=(*step.tips, *plan.paths_after.items()),
    )
    return replace(plan, steps=tuple(steps), then=tuple(with_records(each, later) for each in plan.then))


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


def _by_libvirt(each: Step, step: WriteRecords) -> Step:
    """What a running QEMU would be told by its monitor, as libvirt does it."""
    if isinstance(each, LiveSnapshot):
        return DomainSnapshot(each.cuts, each.quiesce, each.agent, uri=step.uri, uuid=step.uuid)
    if isinstance(each, LiveMerge):
        return DomainMerge(each.jobs, uri=step.uri, uuid=step.uuid)
    return each
