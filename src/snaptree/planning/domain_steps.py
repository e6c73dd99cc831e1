"""The steps that only a libvirt domain's plans have, and putting them into a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from snaptree.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class WriteRecords:
    """Let libvirt's records, the domain's definition and its metadata say what the tree says.

    The tree is the one that is recorded when the step is taken, so that it can be taken any number of times.
    ``renamed`` are the names that a record had and has now.
    """

    kind: ClassVar[str] = "write-records"
    crash: ClassVar[str] = (
        "some of libvirt's records say what they said before; the files that both need are there; recovery writes all "
        "of them again"
    )

    uri: str
    uuid: str
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def summary(self) -> str:
        return "tell libvirt: its records and the domain's definition"


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
    from snaptree.planning.steps import Record, Step

    steps: list[Step] = []
    for number, each in enumerate(plan.steps):
        steps.append(each)
        if isinstance(each, Record) and number >= plan.point_of_no_return:
            steps.append(step)
    later = replace(step, renamed=())
    return replace(plan, steps=tuple(steps), then=tuple(with_records(each, later) for each in plan.then))
