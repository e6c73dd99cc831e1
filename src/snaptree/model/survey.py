"""What was just read from the machine's files and surroundings, as a value.

The readers live in ``images/`` and ``machines/``; the verbs in ``planning/`` take a survey and do no I/O themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from snaptree.model.layer import Identity, LayerId, Point
from snaptree.model.live import Live


class InternalFacts(Struct, frozen=True):
    """One internal snapshot as the image has it. Sizes are in bytes, ``created`` in seconds since the epoch."""

    id: str
    name: str
    virtual_size: int
    memory_size: int
    created: float


class LayerFacts(Struct, frozen=True):
    """What one image file was found to be.

    ``allocated`` is what the file occupies on its file system, ``virtual_size`` what it shows the guest, both in bytes.
    ``problem`` names what is wrong in a word (``missing``, ``changed``, ``loop``, …) or is empty;
    ``detail`` says it in a sentence. ``open_by`` lists processes that have the file open (``name (pid)``).
    """

    path: str
    exists: bool = True
    identity: Identity | None = None
    format: str = "qcow2"
    version: int = 3
    virtual_size: int = 0
    file_size: int = 0
    allocated: int = 0
    cluster_size: int = 65536
    refcount_bits: int = 16
    links: int = 1
    block_device: bool = False
    mode: int = 0o600
    """The permission bits; ``group`` is whom the middle ones are for."""
    group: int = 0
    writable: bool = True
    backing: str | None = None
    backing_format: str | None = None
    dirty: bool = False
    corrupt: bool = False
    encrypted: bool = False
    luks: str = ""
    """The id of an encrypted image's LUKS header (``images/luks.py``): of two with the same, one key opens both."""
    external_data: bool = False
    extended_l2: bool = False
    lazy_refcounts: bool = False
    autoclear: bool = False
    """Whether any autoclear feature bit is set: bitmaps, or something that QEMU does not know."""
    removable: bool = True
    """Whether names in its folder may be changed."""
    compression: str = "zlib"
    bitmaps: tuple[str, ...] = ()
    internals: tuple[InternalFacts, ...] = ()
    written: bool = True
    """Whether anything has been written since it was made: clusters, internal snapshots or bitmaps."""
    problem: str = ""
    detail: str = ""
    open_by: tuple[str, ...] = ()
    unchanged_since: tuple[str, ...] = ()
    """Tags of the internal snapshots since which nothing has been written to the active state."""

    def opens(self, source: LayerFacts) -> bool:
        """Whether others, or a group, may read this file who may not read the source."""
        others = source.mode & 0o004
        group = others or (source.mode & 0o040 and source.group == self.group)
        return bool(self.mode & 0o004 and not others) or bool(self.mode & 0o040 and not group)


class RowFacts(Struct, frozen=True):
    """What merging a row of layers would move, counted exactly from the tables. All figures in bytes.

    A row is a tuple of layer ids, lowest first; the last is the one that stays or goes down.

    :param commit_bytes: data that goes down when all above the lowest are committed into it.
    :param commit_zeroes: of what goes down, how much is zeroes that need no copying.
    :param commit_grows: by how much the lowest file's allocation grows in a commit.
    :param pull_bytes: data that goes up when all below the highest are pulled into it.
    :param pull_grows: by how much the highest file's allocation grows in a pull.
    :param profile_commit: cumulative bytes to move at equal steps over the guest's address range, for progress.
    :param profile_pull: the same for a pull.
    :param extents: how many runs of adjacent clusters there are to move (commit, pull).
    :param by_qemu: why only QEMU's jobs can merge the row; empty where the mover does.
    :param unshared: why the row cannot be merged by sharing blocks; empty where it can.
    :param share_bytes: what is copied all the same when blocks are shared (into the lowest, into the highest).
    :param share_grows: the room that sharing blocks takes for tables (into the lowest, into the highest).
    """

    commit_bytes: int
    commit_zeroes: int
    commit_grows: int
    pull_bytes: int
    pull_grows: int
    extents: tuple[int, int] = (0, 0)
    profile_commit: tuple[int, ...] = ()
    profile_pull: tuple[int, ...] = ()
    by_qemu: str = ""
    unshared: str = ""
    share_bytes: tuple[int, int] = (0, 0)
    share_grows: tuple[int, int] = (0, 0)


class PointFacts(Struct, frozen=True):
    """What making a layer out of an internal snapshot would take. Sizes are in bytes.

    ``bytes`` is the data that it has, ``tables`` the room for tables; ``by_qemu`` and ``unshared`` are as for a row,
    ``share_bytes`` is what is copied all the same when blocks are shared.
    """

    bytes: int
    tables: int = 0
    by_qemu: str = ""
    unshared: str = ""
    share_bytes: int = 0


class FileSystemFacts(Struct, frozen=True):
    """One file system that layers lie on: free bytes for us, and whether files can share blocks there."""

    device: int
    free: int
    can_share: bool = False
    mount: str = ""


class Outsider(Struct, frozen=True):
    """Something outside this tree that stands on a layer of it: another machine, or an overlay found beside it."""

    layer: LayerId
    what: str


class Stray(Struct, frozen=True):
    """An image file that the tree does not know. ``made``: the journal says that snaptree made it."""

    path: str
    generation: int
    inode: int
    allocated: int
    made: bool


class Start(Struct, frozen=True):
    """How the machine is started: its stored command, the folder that it is run in, and where its monitor is then."""

    command: str
    folder: str
    monitor: str


class Survey(Struct, frozen=True):
    """All that was read for one operation.

    ``rows`` and ``points`` have the merges and the internal snapshots that were measured, ``outsiders`` what stands on
    layers from outside the tree,
    ``strays`` files beside the layers that the tree does not know, ``running`` whether the machine runs, and ``live``
    what its monitor says: without that it is not known what runs there. ``names``
    lists what is in each folder that new files may go to (a folder that is not there is absent).
    ``firmware`` has the live firmware state by role, ``keep`` the folder for copies of it, ``agent`` the socket of the
    guest's agent if the user has named it, ``token`` a word that is new to every operation, for names of files that
    nobody chose.
    """

    layers: Mapping[LayerId, LayerFacts] = field(default_factory=dict)
    rows: Mapping[tuple[LayerId, ...], RowFacts] = field(default_factory=dict)
    points: Mapping[Point, PointFacts] = field(default_factory=dict)
    file_systems: Mapping[int, FileSystemFacts] = field(default_factory=dict)
    outsiders: tuple[Outsider, ...] = ()
    strays: tuple[Stray, ...] = ()
    names: Mapping[str, frozenset[str]] = field(default_factory=dict)
    firmware: Mapping[str, str] = field(default_factory=dict)
    firmware_changed: bool = False
    """Whether the live firmware state is another than when the snapshot was taken that the machine stands on."""
    keep: str = ""
    agent: str | None = None
    token: str = "0"
    running: bool = False
    live: Live | None = None
    now: float = 0.0
    bytes_per_second: float = 0.0
    """How fast merges went lately on this machine, from the journal; 0 when nothing is known."""
    free: Mapping[str, int] = field(default_factory=dict)
    """How many bytes there are for us in each folder that new files may go to."""
    memories: Mapping[int, str] = field(default_factory=dict)
    """What is wrong with the file of each memory that is not as it was written, as a sentence."""
    busy: frozenset[LayerId] = frozenset()
    """Layers that an operation writes to, or did when it was killed: what they look like is known when it has ended."""
    start: Start | None = None
    keys: frozenset[str] = frozenset()
    """The LUKS ids of encrypted layers whose keys are known."""
    libvirt: bool = False
    """Whether libvirt has the machine: each snapshot needs layers of its own then, for virsh would merge into one that
    two have together, and while it runs data is pulled into the tips only."""
    monitor: str = ""
    """Where the monitor of a machine is that snaptree starts."""
