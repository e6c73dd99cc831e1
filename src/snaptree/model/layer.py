"""Layers: the image files of a disk, and the points in time that they hold."""

from __future__ import annotations

from msgspec import Struct, field

LayerId = int
"""Names a layer within one tree. Paths change (the root's name is put back after a merge), ids do not."""


class Identity(Struct, frozen=True):
    """What a frozen layer's file looked like when it was frozen, to find out whether somebody has written to it since.

    ``size`` is the file's length in bytes, ``mtime_ns`` its modification time, ``header`` the SHA-256 (hex) of the
    qcow2 header's fixed fields and snapshot table position, or empty for a raw file. ``generation`` tells a file from
    another one that has got its inode number, 0 where the file system does not say; ``device`` holds until a reboot. Of
    a block device only ``size`` and ``header`` hold any longer; its ``generation`` is the boot's.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    header: str = ""
    generation: int = 0


class Layer(Struct, frozen=True):
    """One image file of one disk.

    ``path`` is absolute and canonical: without links, but for one that is a block device's name. ``parent`` is the
    layer that the header names as backing file. ``owned`` is true when snaptree made the file or the user named it; all
    beneath is foreign. ``virtual_size`` is in bytes. ``identity`` is kept for frozen owned layers only: a tip changes
    all the time. ``half_merged`` says that a commit has begun to write here: the layer shows what it should only
    through the one above it.
    """

    id: LayerId
    disk: str
    path: str
    format: str
    parent: LayerId | None
    owned: bool
    virtual_size: int
    identity: Identity | None = None
    half_merged: bool = False
    made: bool = field(default=False)
    """snaptree created the file itself (what ``gc`` may remove without asking)."""


class Point(Struct, frozen=True, order=True):
    """What a disk showed at one time: a whole layer, or an internal snapshot (its tag) within one."""

    layer: LayerId
    internal: str | None = None
