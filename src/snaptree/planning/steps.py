"""The steps that plans are made of, as data.

A step says what will be done; ``running/carry`` does it. What is on disk after a crash in each kind of step stands in
``crash``, from which the documentation is made.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias, get_args

from msgspec import Struct

from snaptree.model.delta import Delta
from snaptree.model.layer import LayerId
from snaptree.model.machine import MachineConfig
from snaptree.model.sizes import readable
from snaptree.planning.domain_memory_steps import DomainGoOver
from snaptree.planning.domain_steps import DomainSwap, LibvirtStep
from snaptree.planning.live_steps import LiveMerge, LiveOpen, LiveSettle, LiveSnapshot, LiveSwap
from snaptree.planning.memory_steps import GoOver, SaveMemory

File: TypeAlias = tuple[str, str]
"""One image in a chain: ``(path, format)``."""


class MakeOverlay(Struct, frozen=True):
    """Make an empty qcow2 file on a backing file, with owner, mode and labels of ``like``.

    ``luks`` is the layer whose LUKS header it gets; empty where none of those beneath is encrypted.
    """

    kind: ClassVar[str] = "make-overlay"
    crash: ClassVar[str] = "a hidden temporary file or the new empty overlay; nothing refers to it; recovery removes it"

    path: str
    backing: str
    backing_format: str
    virtual_size: int
    like: str
    cluster_size: int = 65536
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    extended_l2: bool = False
    compression: str = "zlib"
    luks: str = ""

    @property
    def summary(self) -> str:
        return f"make {self.path}, an empty overlay on {self.backing}"


class BuildFromPoint(Struct, frozen=True):
    """Make a new qcow2 file that shows what an internal snapshot shows, on the same backing file.

    ``below`` is the chain that the source stands on, nearest first. ``bytes`` is what is copied, ``shared`` what is not
    copied because blocks are shared. ``by_qemu`` says why QEMU does it; without it snaptree's mover does. ``luks`` is
    the layer whose LUKS header it gets; empty where neither the source nor any beneath it is encrypted.
    """

    kind: ClassVar[str] = "build-from-point"
    crash: ClassVar[str] = "a hidden temporary file or the new layer; nothing refers to it; recovery removes it"

    path: str
    source: str
    tag: str
    below: tuple[File, ...]
    virtual_size: int
    bytes: int
    cluster_size: int = 65536
    shared: int = 0
    by_qemu: str = ""
    luks: str = ""

    @property
    def summary(self) -> str:
        return f"make {self.path} out of the internal snapshot {self.tag!r} in {self.source}"


class CopyFirmware(Struct, frozen=True):
    """Copy a piece of firmware state whole: aside (a new file) or back over the live one (``replace``)."""

    kind: ClassVar[str] = "copy-firmware"
    crash: ClassVar[str] = "a hidden temporary copy, or the whole copy; the live state is old or new, never in between"

    role: str
    source: str
    target: str
    replace: bool = False

    @property
    def summary(self) -> str:
        return f"copy {self.role} state from {self.source} to {self.target}"


class MakeInternal(Struct, frozen=True):
    """Take an internal snapshot in a layer."""

    kind: ClassVar[str] = "make-internal"
    crash: ClassVar[str] = "the image with or without the internal snapshot, leaked clusters at worst"

    path: str
    tag: str

    @property
    def summary(self) -> str:
        return f"take the internal snapshot {self.tag!r} in {self.path}"


class ApplyInternal(Struct, frozen=True):
    """Make the active state of a layer what one of its internal snapshots shows."""

    kind: ClassVar[str] = "apply-internal"
    crash: ClassVar[str] = (
        "the layer's active state is undefined, its internal snapshots are whole; recovery applies again"
    )

    path: str
    tag: str
    below: tuple[File, ...]

    @property
    def summary(self) -> str:
        return f"go back to the internal snapshot {self.tag!r} in {self.path}"


class DeleteInternal(Struct, frozen=True):
    """Delete one internal snapshot of a layer; what the layer shows stays the same. What a running machine's QEMU has
    open it does itself."""

    kind: ClassVar[str] = "delete-internal"
    crash: ClassVar[str] = "the image with or without the internal snapshot, leaked clusters at worst"

    path: str
    tag: str

    @property
    def summary(self) -> str:
        return f"delete the internal snapshot {self.tag!r} in {self.path}"


class Cover(Struct, frozen=True):
    """Write zeroes into the top of a row where it shows zeroes only because a layer beneath it ends there.

    ``row`` is lowest first, ``below`` what the lowest stands on, nearest first.
    """

    kind: ClassVar[str] = "cover"
    crash: ClassVar[str] = "the top has some of the zeroes; it shows the same with and without them"

    row: tuple[File, ...]
    below: tuple[File, ...]

    @property
    def summary(self) -> str:
        return f"write into {self.row[-1][0]} the zeroes that it shows past the end of shorter layers"


class Shrink(Struct, frozen=True):
    """Cut a merged layer to the size of the layer whose contents it took."""

    kind: ClassVar[str] = "shrink"
    crash: ClassVar[str] = (
        "the lower layer is longer or shorter; until the phases that follow are done it is read only through the upper "
        "one, which shows the same"
    )

    path: str
    format: str
    below: tuple[File, ...]
    size: int

    @property
    def summary(self) -> str:
        return f"shrink {self.path} to {readable(self.size)}"


class MoveJob(Struct, frozen=True):
    """One merge among those that move together.

    ``row`` is the chain to merge, lowest first; ``below`` what the lowest stands on, nearest first. ``commit`` moves
    all upper layers' data into ``row[0]``, ``pull`` all lower layers' data into ``row[-1]``. ``bytes`` is what will
    be copied, ``zeroes`` what is written as zeroes without copying, ``profile`` the cumulative bytes at equal steps
    over the guest's address range. ``by_qemu`` says why QEMU's job does it; without it snaptree's mover does.
    """

    name: str
    way: str
    disk: str
    row: tuple[File, ...]
    below: tuple[File, ...]
    bytes: int
    zeroes: int = 0
    profile: tuple[int, ...] = ()
    by_qemu: str = ""


class Move(Struct, frozen=True):
    """Move the data of all merges, all disks at once."""

    kind: ClassVar[str] = "move"
    crash: ClassVar[str] = (
        "pull: the upper layer holds more clusters and shows the same; commit: the lower layer is half-merged and is "
        "read only through the one above; gc goes on"
    )

    jobs: tuple[MoveJob, ...]

    @property
    def summary(self) -> str:
        parts = [
            f"{job.way} {readable(job.bytes)} of {job.disk} "
            + (f"down into {job.row[0][0]}" if job.way == "commit" else f"up into {job.row[-1][0]}")
            + (f" by QEMU ({job.by_qemu})" if job.by_qemu else "")
            for job in self.jobs
        ]
        return "; ".join(parts)


class BuildMerged(Struct, frozen=True):
    """Build, out of blocks shared with the files of a row, the file that will take the place of one of them.

    ``row`` is lowest first, ``below`` what the lowest stands on, nearest first. ``path`` is the lowest's or the
    highest's: a copy of that file gets what is missing in it. ``shared`` is what is brought over by sharing, ``bytes``
    what is copied all the same.
    """

    kind: ClassVar[str] = "build-merged"
    crash: ClassVar[str] = "a hidden temporary file; nothing refers to it; recovery removes it"

    path: str
    row: tuple[File, ...]
    below: tuple[File, ...]
    shared: int
    bytes: int
    guest: str = ""
    """The file that the guest of a running domain writes to: who has that open may have the one that is replaced."""

    @property
    def into(self) -> int:
        """The place in the row of the layer that it is a copy of."""
        return 0 if self.path == self.row[0][0] else len(self.row) - 1

    @property
    def summary(self) -> str:
        others = ", ".join(path for path, _ in self.row if path != self.path)
        return f"build what will be {self.path} out of blocks shared with it and {others} ({readable(self.shared)})"


class PutInPlace(Struct, frozen=True):
    """Let what was built take the place of the file that it is a copy of, in one rename."""

    kind: ClassVar[str] = "put-in-place"
    crash: ClassVar[str] = "the path names the file of before or the merged one; what stands on it shows the same"

    path: str
    live: bool = False
    """Whether the machine's QEMU has the file open that it replaces: it goes over to what was built."""

    @property
    def summary(self) -> str:
        return f"put it in place as {self.path}"


class Repoint(Struct, frozen=True):
    """Write another backing name into a layer's header; what the layer shows stays the same."""

    kind: ClassVar[str] = "repoint"
    crash: ClassVar[str] = "the header has the old or the new backing name; both show the same"

    path: str
    backing: str | None
    backing_format: str | None

    @property
    def summary(self) -> str:
        return f"point {self.path} at {self.backing or 'nothing'}"


class TakeName(Struct, frozen=True):
    """Let ``target`` name the file that ``source`` names; ``source`` stays until it is unlinked."""

    kind: ClassVar[str] = "take-name"
    crash: ClassVar[str] = (
        "the target's name shows what it did, if anything, or the file that is to have it; everything kept uses the "
        "source's name"
    )

    source: str
    target: str

    @property
    def summary(self) -> str:
        return f"put {self.source} in place as {self.target}"


class Record(Struct, frozen=True):
    """Change the tree, in one transaction; ``baseline`` are layers whose identity is read and kept now.

    ``otherwise`` is how the tree changes instead where memory could not be saved whose disks were frozen already.
    """

    kind: ClassVar[str] = "record"
    crash: ClassVar[str] = "the tree before or the tree after"

    delta: Delta
    baseline: tuple[LayerId, ...] = ()
    what: str = "record the new tree"
    otherwise: Delta | None = None

    @property
    def summary(self) -> str:
        return self.what


class Unlink(Struct, frozen=True):
    """Remove a file that nothing needs, if it still is the file that the plan saw (by its inode)."""

    kind: ClassVar[str] = "unlink"
    crash: ClassVar[str] = "the file is there or gone; nothing needs it"

    path: str
    generation: int
    inode: int
    freed: int = 0

    @property
    def summary(self) -> str:
        return f"remove {self.path}"


class RemoveFirmware(Struct, frozen=True):
    """Remove a copy of firmware state that nothing refers to."""

    kind: ClassVar[str] = "remove-firmware"
    crash: ClassVar[str] = "the copy is there, partly there or gone; nothing needs it"

    role: str
    path: str

    @property
    def summary(self) -> str:
        return f"remove the copy of {self.role} state at {self.path}"


class Register(Struct, frozen=True):
    """Remember a machine, or what is new of it."""

    kind: ClassVar[str] = "register"
    crash: ClassVar[str] = "the machine is known as before or as after"

    config: MachineConfig

    @property
    def summary(self) -> str:
        return f"remember machine {self.config.name}"


class Forget(Struct, frozen=True):
    """Forget a machine and its tree."""

    kind: ClassVar[str] = "forget"
    crash: ClassVar[str] = "the machine is known or not"

    name: str

    @property
    def summary(self) -> str:
        return f"forget machine {self.name}"


LiveStep: TypeAlias = LiveSnapshot | LiveOpen | LiveMerge | LiveSwap | LiveSettle | SaveMemory | GoOver
"""Those that the QEMU of a running machine takes."""

Step: TypeAlias = (
    MakeOverlay
    | BuildFromPoint
    | CopyFirmware
    | MakeInternal
    | ApplyInternal
    | DeleteInternal
    | Cover
    | Shrink
    | Move
    | BuildMerged
    | PutInPlace
    | Repoint
    | TakeName
    | LiveStep
    | Record
    | Unlink
    | RemoveFirmware
    | Register
    | Forget
    | LibvirtStep
)

STEPS: tuple[type[Step], ...] = get_args(Step)

MAY_HAVE_HAPPENED: tuple[type[Step], ...] = (LiveSnapshot, LiveMerge, SaveMemory, GoOver, DomainSwap, DomainGoOver)
"""Those, and libvirt's kinds of them, that QEMU or libvirt brings about, also when snaptree has been killed: before it
undoes them recovery finds out whether they have happened."""
