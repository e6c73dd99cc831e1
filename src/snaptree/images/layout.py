"""A new, empty qcow2 image, as bytes.

Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU. The clusters are, in this order: header, refcount
table, refcount blocks, L1 table, and a LUKS header where there is one.
"""

from __future__ import annotations

import os
import struct

from snaptree.errors import UsageError
from snaptree.images.header import (
    COMPATIBLE_LAZY,
    CRYPT_LUKS,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_ENCRYPTION,
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_EXTENDED_L2,
    MAGIC,
    MAX_BACKING_NAME,
    MAX_L1_BYTES,
)
from snaptree.images.luks import LuksHeader

HEADER_LENGTH = 112


def empty_overlay(
    virtual_size: int,
    *,
    cluster_bits: int = 16,
    refcount_bits: int = 16,
    backing_name: str | None = None,
    backing_format: str | None = None,
    lazy_refcounts: bool = False,
    extended_l2: bool = False,
    compression: str = "zlib",
    luks: LuksHeader | None = None,
) -> tuple[list[tuple[int, bytes]], int]:
    """The writes (``(offset, bytes)``) that make an empty qcow2 version 3 file, and its length in bytes.

    Everything that is not written is a hole of zeroes. The backing format comes first among the extensions, so that it
    lies in the first sector and can be changed in one write together with the name's position.

    :raise UsageError: the size is more than clusters of that size can address, or the name does not fit.
    """
    if not (14 if extended_l2 else 9) <= cluster_bits <= 21:
        raise UsageError(
            f"clusters of 2^{cluster_bits} bytes cannot be", "use 512 bytes (16 KiB with subclusters) to 2 MiB"
        )
    if refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
        raise UsageError(f"reference counts of {refcount_bits} bits cannot be", "use 1, 2, 4, 8, 16, 32 or 64")
    if virtual_size < 0 or virtual_size % 512:
        raise UsageError(f"a disk of {virtual_size} bytes cannot be", "use a multiple of 512")
    if compression not in ("zlib", "zstd"):
        raise UsageError(f"compression {compression!r} is not known", "use zlib or zstd")
    cluster = 1 << cluster_bits
    per_l2 = cluster // (16 if extended_l2 else 8) * cluster
    l1_entries = max(1, -(-virtual_size // per_l2))
    if l1_entries * 8 > MAX_L1_BYTES:
        raise UsageError(
            f"a disk of {virtual_size} bytes is too large for clusters of {cluster} bytes", "use larger clusters"
        )
    l1_clusters = -(-l1_entries * 8 // cluster)
    luks_clusters = -(-luks.length // cluster) if luks is not None else 0
    table_clusters, blocks = _refcounts(cluster, refcount_bits, 1 + l1_clusters + luks_clusters)
    table_at = cluster
    blocks_at = table_at + table_clusters * cluster
    l1_at = blocks_at + blocks * cluster
    luks_at = l1_at + l1_clusters * cluster
    used = 1 + table_clusters + blocks + l1_clusters + luks_clusters

    extensions = b""
    if backing_format is not None:
        data = backing_format.encode("ascii")
        extensions += struct.pack(">II", EXTENSION_BACKING_FORMAT, len(data)) + data.ljust(
            -(-len(data) // 8) * 8, b"\0"
        )
    if luks is not None:
        extensions += struct.pack(">IIQQ", EXTENSION_ENCRYPTION, 16, luks_at, luks.length)
    extensions += bytes(8)
    name = os.fsencode(backing_name) if backing_name is not None else b""
    name_at = HEADER_LENGTH + len(extensions)
    if len(name) > MAX_BACKING_NAME or name_at + len(name) > cluster:
        raise UsageError(
            f"the backing file name {backing_name!r} does not fit into a header of {cluster} bytes",
            "use a shorter path, or larger clusters",
        )
    incompatible = (INCOMPATIBLE_EXTENDED_L2 if extended_l2 else 0) | (
        INCOMPATIBLE_COMPRESSION if compression == "zstd" else 0
    )
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQIIB7x",
        MAGIC,
        3,
        name_at if name else 0,
        len(name),
        cluster_bits,
        virtual_size,
        0 if luks is None else CRYPT_LUKS,
        l1_entries,
        l1_at,
        table_at,
        table_clusters,
        0,
        0,
        incompatible,
        COMPATIBLE_LAZY if lazy_refcounts else 0,
        0,
        refcount_bits.bit_length() - 1,
        HEADER_LENGTH,
        1 if compression == "zstd" else 0,
    )
    writes = [(0, header + extensions + name)]
    table = b"".join(struct.pack(">Q", blocks_at + number * cluster) for number in range(blocks))
    writes.append((table_at, table))
    writes.append((blocks_at, _ones(used, refcount_bits)))
    if luks is not None:
        writes += [(luks_at + at, piece) for at, piece in luks.pieces]
    return writes, used * cluster


def _refcounts(cluster: int, refcount_bits: int, others: int) -> tuple[int, int]:
    """How many clusters the refcount table and the refcount blocks take, to count themselves and the others."""
    per_block = cluster * 8 // refcount_bits
    table, blocks = 1, 1
    while True:
        used = others + table + blocks
        need_blocks = -(-used // per_block)
        need_table = -(-need_blocks * 8 // cluster)
        if need_blocks <= blocks and need_table <= table:
            return table, blocks
        blocks, table = max(blocks, need_blocks), max(table, need_table)


def _ones(count: int, bits: int) -> bytes:
    """Reference counts of one. Widths under a byte fill it from its lowest bits on."""
    if bits >= 8:
        return (1).to_bytes(bits // 8, "big") * count
    per_byte = 8 // bits
    whole = sum(1 << (number * bits) for number in range(per_byte))
    rest = sum(1 << (number * bits) for number in range(count % per_byte))
    return bytes([whole]) * (count // per_byte) + (bytes([rest]) if rest else b"")
