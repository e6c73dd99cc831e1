"""The steps on a libvirt domain's memory, as data, and how what a QEMU would be told becomes one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from msgspec import Struct, field

from snaptree.model.live import PAUSED, RUNNING
from snaptree.model.sizes import readable
from snaptree.planning.live_steps import File, Kept
from snaptree.planning.memory_steps import GoOver, Save, SaveMemory

if TYPE_CHECKING:
    from snaptree.model.tree import Tree


class DomainSaveMemory(SaveMemory, frozen=True):
    """Have libvirt save a running domain's memory and let its disks go on in their new overlays, all of one instant.

    libvirt writes the record of the snapshot ``name`` with it.
    """

    kind: ClassVar[str] = "domain-save-memory"
    crash: ClassVar[str] = (
        "libvirt goes on by itself, and recovery waits for that: the guest writes to the overlays, on all disks, and "
        "the memory is whole, or it writes to the tips, and the memory is removed"
    )

    uri: str = ""
    uuid: str = ""
    name: str = ""


class DomainGoOver(Struct, frozen=True):
    """Have libvirt turn a domain off, saving its memory if wanted, and load another memory on other disks.

    ``memory`` is the file that is loaded, without which the domain stays off; ``disks`` are the files that the disks
    begin on then, and ``pieces`` what its firmware state is to be. With ``save`` the memory of now is saved first, with
    a record of the name ``parks``. ``firmware`` are copies of the firmware's state of now, brought up to date when
    the guest has come to its end. The guest that was loaded stands still until libvirt has been told all
    (:class:`DomainGoOn`); ``after`` is what it does then.
    """

    kind: ClassVar[str] = "domain-go-over"
    crash: ClassVar[str] = (
        "libvirt goes on by itself, and recovery waits for that: the memory has been loaded, and the guest goes on "
        "from it, or nothing is to be loaded, and the journal says that the domain is off; otherwise it goes on from "
        "the memory of now, where that was saved, and is started anew on the disks of before where it was to be given "
        "up; firmware state is that of the one that goes on"
    )

    uri: str
    uuid: str
    after: str
    memory: str | None = None
    disks: Mapping[str, File] = field(default_factory=dict)
    pieces: tuple[Kept, ...] = ()
    save: Save | None = None
    parks: str = ""
    firmware: tuple[Kept, ...] = ()

    @property
    def summary(self) -> str:
        parts = []
        if self.save is not None:
            parts.append(f"save the memory of now ({readable(self.save.used)}) in {self.save.path}")
        parts.append("have libvirt end the machine's QEMU, if it runs")
        if self.memory is not None:
            parts.append(f"load {self.memory}" + (", paused" if self.after == PAUSED else ""))
        return "; ".join(parts)


class DomainGoOn(Struct, frozen=True):
    """Let a guest go on whose memory has been loaded: libvirt knows by now what else there is of it."""

    kind: ClassVar[str] = "domain-go-on"
    crash: ClassVar[str] = "the guest stands still or goes on; recovery lets it go on"

    uri: str
    uuid: str
    disks: Mapping[str, File] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        return "let the guest go on"


DomainMemoryStep: TypeAlias = DomainSaveMemory | DomainGoOver | DomainGoOn


def saved_by_libvirt(step: SaveMemory, after: Tree, uri: str, uuid: str) -> DomainSaveMemory:
    """What a QEMU would be told, as libvirt does it.

    :param after: the tree that stands then.
    """
    name = _named_by(step.path, after)
    return DomainSaveMemory(
        step.cuts, step.path, step.like, step.forms, step.used, step.marks, step.firmware, uri, uuid, name
    )


def gone_over_by_libvirt(step: GoOver, after: Tree, uri: str, uuid: str) -> DomainGoOver:
    """What two QEMUs would be told, as libvirt does it with one after the other."""
    load = step.load
    return DomainGoOver(
        uri=uri,
        uuid=uuid,
        after=step.after,
        memory=load.memory.path if load is not None else None,
        disks={disk: chain[0][1:] for disk, chain in load.disks.items()} if load is not None else {},
        pieces=load.firmware if load is not None else (),
        save=step.save,
        parks=_named_by(step.save.path, after) if step.save is not None else "",
        firmware=step.firmware,
    )


def going_on(step: DomainGoOver) -> tuple[DomainGoOn, ...]:
    """What is left to be done when libvirt has been told all."""
    if step.memory is None or step.after != RUNNING:
        return ()
    return (DomainGoOn(step.uri, step.uuid, step.disks),)


def _named_by(path: str, tree: Tree) -> str:
    """The snapshot or the branch that has the memory in the file: it is new, and has it alone."""
    numbers = {each.id for each in tree.memories.values() if each.path == path}
    return next(each.name for each in tree.named if each.memory in numbers)
