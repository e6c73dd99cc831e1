"""A libvirt domain and libvirt's records of its snapshots, as values: what was read from libvirt's XML.

A record of libvirt's has the domain as it was when the snapshot was taken, in which a disk names the *point*, and
besides, by disk, the *overlay* in which work went on then; when the machine has gone back to the snapshot since, that
overlay is among the ``reverts``. What libvirt has no word for, snaptree notes in the record's metadata (:class:`Mark`)
and the domain's (:class:`Hints`). The latter can be rebuilt.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from snaptree.model.snapshot import FirmwareFile

SNAPSHOT, BRANCH, PLACEHOLDER = "snapshot", "branch", "placeholder"
EXTERNAL, INTERNAL = "external", "internal"


class DomainDisk(Struct, frozen=True):
    """A disk of a domain that snaptree looks after: the file that it begins on, canonical, and its format."""

    target: str
    path: str
    format: str


class Hints(Struct, frozen=True):
    """What snaptree keeps in a domain's ``<metadata>``: a cache.

    ``active`` is the active branch's name, ``parent`` the snapshot that it grew from, ``roots`` the path and format
    that each disk's root came with, ``renamed`` where that is until it can have its name again, ``owned`` the layers
    that are not foreign, ``made`` those that snaptree made. ``going`` are the path and tag of internal snapshots that
    nothing shows any more: they go when the domain is off.
    """

    active: str | None = None
    parent: str | None = None
    created: float = 0.0
    roots: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    owned: frozenset[str] = frozenset()
    made: frozenset[str] = frozenset()
    going: frozenset[tuple[str, str]] = frozenset()


class Domain(Struct, frozen=True):
    """A domain. ``left`` says, by target, why a disk is left alone; ``nvram`` is where its UEFI variables are.

    ``nvram_left`` says why these are left alone, where they are and snaptree cannot keep them. With a ``tpm`` it has
    state that is libvirt's, and comes back with memory alone.
    ``lost`` are the volumes of its disks that cannot be found, as pool and name.
    """

    name: str
    uuid: str
    uri: str
    state: str
    persistent: bool = True
    disks: tuple[DomainDisk, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    nvram: str | None = None
    nvram_left: str = ""
    tpm: bool = False
    saved: bool = False
    """Whether it has a managed save image."""
    hints: Hints = field(default_factory=Hints)
    lost: tuple[tuple[str, str], ...] = ()


class Mark(Struct, frozen=True):
    """What snaptree notes in a record.

    ``kind`` is ``snapshot``, ``branch`` (the record of a parked branch: its points are the branch's tips) or
    ``placeholder`` (it stands where the active branch grew from while no snapshot does). ``tags`` are those internal
    snapshots, by disk, that have another name in the image than the record. ``guarded`` are disks that virsh is kept
    from deleting: it takes them for ones whose deletion was interrupted. The current record has the active branch's
    name as ``active``.
    """

    kind: str = SNAPSHOT
    created: float = 0.0
    consistency: str = ""
    firmware: tuple[FirmwareFile, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    guarded: frozenset[str] = frozenset()
    active: str | None = None


class RecordDisk(Struct, frozen=True):
    """A disk of a record: ``kind`` is ``external``, ``internal``, ``no`` or ``manual``; ``overlay`` is canonical.

    ``deleting`` says that libvirt was about to merge the overlay into what it stands on, and has not come to an end.
    """

    kind: str
    overlay: str | None = None
    format: str | None = None
    deleting: bool = False


class Record(Struct, frozen=True):
    """One of libvirt's records of a snapshot. ``points`` are the disks of the domain in it, ``(path, format)``.

    ``state`` is libvirt's word, ``memory`` the file with the machine's memory, ``hints`` what the metadata was.
    ``lost`` are the volumes of its points that cannot be found, as pool and name.
    """

    name: str
    parent: str | None
    created: float
    description: str
    state: str
    disks: Mapping[str, RecordDisk]
    points: Mapping[str, tuple[str, str]]
    reverts: Mapping[str, RecordDisk] = field(default_factory=dict)
    memory: str | None = None
    mark: Mark | None = None
    hints: Hints = field(default_factory=Hints)
    inside: bool = False
    """Whether its memory is within an image, as an internal snapshot of a machine that ran has it."""
    lost: tuple[tuple[str, str], ...] = ()
