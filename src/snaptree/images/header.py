"""The qcow2 header, snapshot table and bitmap directory, read with bounds.

Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU. Every count and offset is checked before anything
is allocated or sought, since images can come from anywhere.
"""

from __future__ import annotations

import hashlib
import os
import struct

from msgspec import Struct

from snaptree.errors import UnhealthyError
from snaptree.model.survey import InternalFacts

MAGIC = b"QFI\xfb"
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65_536
MAX_SNAPSHOT_TABLE_BYTES = 64 << 20
MAX_BACKING_NAME = 1023
MAX_BITMAP_DIRECTORY = 16 << 20
MAX_OFFSET = 1 << 56
"""Offsets in a qcow2 file have 56 bits."""

EXTENSION_END = 0x00000000
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_ENCRYPTION = 0x0537BE77
EXTENSION_DATA_FILE = 0x44415441

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
COMPATIBLE_LAZY = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
CRYPT_LUKS = 2

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_KNOWN_INCOMPATIBLE = 0b11111


class Header(Struct, frozen=True):
    """A qcow2 header, as the specification names its fields. Sizes and offsets are in bytes.

    ``extensions`` are ``(magic, offset of the data, data)`` in their order; ``backing_offset`` is 0 without a backing
    file.
    """

    version: int
    cluster_bits: int
    virtual_size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible: int
    compatible: int
    autoclear: int
    refcount_bits: int
    header_length: int
    compression: str
    backing: str | None
    backing_offset: int
    backing_format: str | None
    extensions: tuple[tuple[int, int, bytes], ...]
    extensions_end: int

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def dirty(self) -> bool:
        """Whether refcounts may be stale (lazy refcounts, and the writer was killed)."""
        return bool(self.incompatible & INCOMPATIBLE_DIRTY)

    @property
    def corrupt(self) -> bool:
        """Whether QEMU has marked the image as corrupt."""
        return bool(self.incompatible & INCOMPATIBLE_CORRUPT)

    @property
    def external_data(self) -> bool:
        """Whether guest data lies in another file."""
        return bool(self.incompatible & INCOMPATIBLE_DATA_FILE)

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries have subclusters."""
        return bool(self.incompatible & INCOMPATIBLE_EXTENDED_L2)

    @property
    def lazy_refcounts(self) -> bool:
        """Whether refcounts may be updated late."""
        return bool(self.compatible & COMPATIBLE_LAZY)

    @property
    def has_bitmaps(self) -> bool:
        """Whether the image has persistent bitmaps that are in force."""
        return bool(self.autoclear & AUTOCLEAR_BITMAPS) and self.extension(EXTENSION_BITMAPS) is not None

    @property
    def encrypted(self) -> bool:
        """Whether guest data is encrypted."""
        return self.crypt_method != 0

    def extension(self, magic: int) -> bytes | None:
        """The data of a header extension, if the image has it."""
        return next((data for number, _, data in self.extensions if number == magic), None)


def is_qcow2(data: bytes) -> bool:
    """Whether a file that begins so is qcow2."""
    return data[:4] == MAGIC


def _bad(path: str, what: str) -> UnhealthyError:
    return UnhealthyError(f"{path} is damaged: {what}", "look at it with 'qemu-img check', or restore it from a backup")


def read_header(descriptor: int, path: str) -> Header:
    """Read and check the header.

    :param path: for messages.
    :raise UnhealthyError: it is not a qcow2 header, or one that the specification does not allow.
    """
    head = os.pread(descriptor, 112, 0)
    if not is_qcow2(head):
        raise UnhealthyError(f"{path} is not a qcow2 image", "give its format with --disk vda=PATH,format=raw")
    if len(head) < _V2.size:
        raise _bad(path, "the file ends within its header")
    (_, version, backing_offset, backing_size, cluster_bits, size, crypt, l1_size, l1_offset, rt_offset, rt_clusters,
     nb_snapshots, snapshots_offset) = _V2.unpack_from(head)  # fmt: skip
    if version not in (2, 3):
        raise UnhealthyError(f"{path} is qcow2 version {version}, which is not known", "versions 2 and 3 are handled")
    incompatible = compatible = autoclear = 0
    refcount_order, header_length, compression = 4, 72, "zlib"
    if version == 3:
        if len(head) < 104:
            raise _bad(path, "the file ends within its header")
        incompatible, compatible, autoclear, refcount_order, header_length = _V3.unpack_from(head, 72)
        if header_length > 104 and len(head) > 104:
            compression = {0: "zlib", 1: "zstd"}.get(head[104], "unknown")
    if not 9 <= cluster_bits <= 21:
        raise _bad(path, f"clusters of 2^{cluster_bits} bytes")
    cluster = 1 << cluster_bits
    if incompatible & ~_KNOWN_INCOMPATIBLE:
        raise UnhealthyError(f"{path} has features that are not known ({incompatible:#x})", "use a newer version")
    if refcount_order > 6:
        raise _bad(path, f"reference counts of 2^{refcount_order} bits")
    if header_length < (104 if version == 3 else 72) or header_length % 8 or header_length > cluster:
        raise _bad(path, f"a header of {header_length} bytes")
    if compression == "unknown":
        raise UnhealthyError(f"{path} has a compression type that is not known", "use a newer version")
    if crypt > CRYPT_LUKS:
        raise UnhealthyError(f"{path} is encrypted in a way that is not known ({crypt})", "use a newer version")
    _check_tables(path, cluster, size, l1_size, l1_offset, rt_offset, rt_clusters, extended=bool(incompatible & 16))
    if nb_snapshots > MAX_SNAPSHOTS or (
        nb_snapshots and (snapshots_offset % cluster or not 0 < snapshots_offset < MAX_OFFSET)
    ):
        raise _bad(path, f"a table of {nb_snapshots} internal snapshots at {snapshots_offset}")
    if backing_offset and (
        backing_size > MAX_BACKING_NAME or not header_length <= backing_offset <= cluster - backing_size
    ):
        raise _bad(path, f"a backing file name of {backing_size} bytes at {backing_offset}")
    # Extensions lie between the header and the backing file's name, or the end of the first cluster.
    region = os.pread(descriptor, cluster, 0)
    limit = min(backing_offset or cluster, len(region))
    extensions, end = _extensions(path, region, header_length, limit)
    backing = None
    if backing_offset:
        name = region[backing_offset : backing_offset + backing_size]
        if len(name) < backing_size or not name or b"\0" in name:
            raise _bad(path, "an empty or cut backing file name")
        backing = os.fsdecode(name)
    formats = [data for magic, _, data in extensions if magic == EXTENSION_BACKING_FORMAT]
    if len(formats) > 1:
        # QEMU takes the last; a reader that takes the first would judge another chain than QEMU opens.
        raise _bad(path, "it says the format of its backing file twice")
    form = formats[0] if formats else None
    return Header(
        version=version,
        cluster_bits=cluster_bits,
        virtual_size=size,
        crypt_method=crypt,
        l1_size=l1_size,
        l1_table_offset=l1_offset,
        refcount_table_offset=rt_offset,
        refcount_table_clusters=rt_clusters,
        nb_snapshots=nb_snapshots,
        snapshots_offset=snapshots_offset,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_bits=1 << refcount_order,
        header_length=header_length,
        compression=compression,
        backing=backing,
        backing_offset=backing_offset,
        backing_format=form.decode("ascii", "replace") if form is not None else None,
        extensions=extensions,
        extensions_end=end,
    )


def _check_tables(
    path: str,
    cluster: int,
    size: int,
    l1_size: int,
    l1_offset: int,
    rt_offset: int,
    rt_clusters: int,
    *,
    extended: bool,
) -> None:
    if size >= 1 << 63:
        raise _bad(path, f"a virtual size of {size} bytes")
    per_table = cluster // (16 if extended else 8) * cluster
    if l1_size * 8 > MAX_L1_BYTES:
        raise _bad(path, f"an L1 table of {l1_size} entries")
    if l1_size < -(-size // per_table):
        raise _bad(path, f"an L1 table of {l1_size} entries is too small for {size} bytes")
    if l1_size and (l1_offset % cluster or not l1_offset or l1_offset >= MAX_OFFSET):
        raise _bad(path, f"an L1 table at {l1_offset}")
    if rt_clusters * cluster > MAX_REFCOUNT_TABLE_BYTES:
        raise _bad(path, f"a refcount table of {rt_clusters} clusters")
    if rt_offset % cluster or not rt_offset or rt_offset >= MAX_OFFSET or not rt_clusters:
        raise _bad(path, f"a refcount table at {rt_offset} with {rt_clusters} clusters")


def _extensions(path: str, region: bytes, start: int, limit: int) -> tuple[tuple[tuple[int, int, bytes], ...], int]:
    found: list[tuple[int, int, bytes]] = []
    at = start
    while at + 8 <= limit:
        magic, length = struct.unpack_from(">II", region, at)
        at += 8
        if magic == EXTENSION_END:
            return tuple(found), at
        if length > limit - at:
            raise _bad(path, f"a header extension of {length} bytes")
        found.append((magic, at, region[at : at + length]))
        at += (length + 7) & ~7
    return tuple(found), min(at, limit)


def header_hash(descriptor: int, header: Header) -> str:
    """What tells, with size and time of change, whether an image was written to: SHA-256 (hex).

    It covers the fields that QEMU changes when it writes (sizes, tables, internal snapshots) and the active L1 table,
    of which more than a mebibyte is taken at both ends only. The backing file's name is left out: it may be changed
    without changing what the image shows. So are the dirty and the corrupt bit: they are facts of their own, and
    repairing refcounts clears the one without changing what the image shows.
    """
    digest = hashlib.sha256()
    fields = (
        header.version,
        header.cluster_bits,
        header.virtual_size,
        header.crypt_method,
        header.l1_size,
        header.l1_table_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.nb_snapshots,
        header.snapshots_offset,
        header.incompatible & ~(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT),
        header.compatible,
    )
    digest.update(repr(fields).encode())
    length = header.l1_size * 8
    if length <= 1 << 20:
        digest.update(os.pread(descriptor, length, header.l1_table_offset))
    else:
        digest.update(os.pread(descriptor, 1 << 19, header.l1_table_offset))
        digest.update(os.pread(descriptor, 1 << 19, header.l1_table_offset + length - (1 << 19)))
    return digest.hexdigest()


class InternalEntry(Struct, frozen=True):
    """One entry of the snapshot table: the facts, and where its L1 table is."""

    facts: InternalFacts
    l1_table_offset: int
    l1_size: int


def read_internals(descriptor: int, header: Header, path: str) -> tuple[InternalEntry, ...]:
    """The snapshot table.

    :raise UnhealthyError: it is cut or larger than may be.
    """
    found: list[InternalEntry] = []
    at, total = header.snapshots_offset, 0
    for _ in range(header.nb_snapshots):
        fixed = os.pread(descriptor, 40, at)
        if len(fixed) < 40:
            raise _bad(path, "the table of internal snapshots is cut")
        l1_offset, l1_size, id_size, name_size, seconds, nanos, _, memory, extra_size = struct.unpack(
            ">QIHHIIQII", fixed
        )
        if extra_size > 1024:
            raise _bad(path, f"an internal snapshot with {extra_size} bytes of extra data")
        if l1_size * 8 > MAX_L1_BYTES or l1_offset % header.cluster_size or l1_offset >= MAX_OFFSET:
            raise _bad(path, f"an internal snapshot with an L1 table of {l1_size} entries at {l1_offset}")
        rest = os.pread(descriptor, extra_size + id_size + name_size, at + 40)
        if len(rest) < extra_size + id_size + name_size:
            raise _bad(path, "the table of internal snapshots is cut")
        extra = rest[:extra_size]
        big_memory = struct.unpack_from(">Q", extra)[0] if extra_size >= 8 else memory
        size = struct.unpack_from(">Q", extra, 8)[0] if extra_size >= 16 else header.virtual_size
        found.append(
            InternalEntry(
                InternalFacts(
                    id=os.fsdecode(rest[extra_size : extra_size + id_size]),
                    name=os.fsdecode(rest[extra_size + id_size :]),
                    virtual_size=size,
                    memory_size=big_memory,
                    created=seconds + nanos / 1e9,
                ),
                l1_offset,
                l1_size,
            )
        )
        length = (40 + extra_size + id_size + name_size + 7) & ~7
        at += length
        total += length
        if total > MAX_SNAPSHOT_TABLE_BYTES:
            raise _bad(path, "the table of internal snapshots is larger than may be")
    return tuple(found)


def read_bitmaps(descriptor: int, header: Header, path: str) -> tuple[str, ...]:
    """The names of the persistent bitmaps that are in force.

    :raise UnhealthyError: the bitmap directory is not one that may be.
    """
    data = header.extension(EXTENSION_BITMAPS)
    if data is None or not header.has_bitmaps:
        return ()
    if len(data) < 24:
        raise _bad(path, "the bitmaps extension is cut")
    count, _, directory_size, directory_offset = struct.unpack_from(">IIQQ", data)
    if directory_size > MAX_BITMAP_DIRECTORY or count > 65_535 or directory_offset >= MAX_OFFSET:
        raise _bad(path, f"a bitmap directory of {directory_size} bytes at {directory_offset}")
    directory = os.pread(descriptor, directory_size, directory_offset)
    names: list[str] = []
    at = 0
    for _ in range(count):
        if at + 24 > len(directory):
            raise _bad(path, "the bitmap directory is cut")
        _, _, _, _, _, name_size, extra_size = struct.unpack_from(">QIIBBHI", directory, at)
        start = at + 24 + extra_size
        if start + name_size > len(directory):
            raise _bad(path, "the bitmap directory is cut")
        names.append(os.fsdecode(directory[start : start + name_size]))
        at = (start + name_size + 7) & ~7
    return tuple(names)
