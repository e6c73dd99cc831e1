"""What an image file is, read cheaply: one open and a few reads."""

from __future__ import annotations

import errno
import os
import stat

from msgspec.structs import replace

from snaptree.errors import SnaptreeError
from snaptree.images.header import (
    Header,
    InternalEntry,
    header_hash,
    is_qcow2,
    read_bitmaps,
    read_header,
    read_internals,
)
from snaptree.images.inode import boot, generation_of
from snaptree.images.luks import luks_id
from snaptree.model.layer import Identity
from snaptree.model.survey import LayerFacts
from snaptree.paths import opened_at

QCOW2_ENDINGS = (".qcow2", ".qcow", ".q2")
_OFFSET = 0x00FFFFFFFFFFFE00
_CHUNK = 1 << 20
_COMPARED = 64 << 20
"""So many bytes of L1 tables of internal snapshots are compared; a hostile image can name 65,536 of 32 MiB each."""


def open_to_read(path: str) -> int:
    """A descriptor for reading that follows no link in the last place, but to a block device, and waits for no FIFO.

    :raise OSError: it cannot be opened, or is neither a regular file nor a block device.
    """
    descriptor = os.open(opened_at(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is neither a regular file nor a block device", path)
    return descriptor


def guess_format(path: str, head: bytes) -> str | None:
    """``qcow2`` when name and magic agree; otherwise ``None``: a guest can write what it likes into a raw disk."""
    return "qcow2" if path.lower().endswith(QCOW2_ENDINGS) and is_qcow2(head) else None


def read_facts(path: str, image_format: str | None) -> LayerFacts:
    """What the file at the path is. A bad image raises nothing: its facts have a ``problem``.

    ``backing`` is the name as the header has it; ``written`` does not look at the parent.

    :param image_format: ``qcow2`` or ``raw``; ``None`` to take it from name and magic.
    """
    facts = LayerFacts(path=path, format=image_format or "qcow2")
    try:
        descriptor = open_to_read(path)
    except FileNotFoundError:
        return replace(facts, exists=False, problem="missing", detail=f"{path} is not there")
    except OSError as error:
        return replace(facts, problem="unreadable", detail=f"{path} cannot be read: {error.strerror or error}")
    try:
        facts = _of_file(descriptor, facts)
        return _read(descriptor, facts, image_format)
    except OSError as error:
        # It can still be told from another file, and be removed when nothing needs it.
        return replace(facts, problem="unreadable", detail=f"{path} cannot be read: {error.strerror or error}")
    finally:
        os.close(descriptor)


def _of_file(descriptor: int, facts: LayerFacts) -> LayerFacts:
    """What can be known of the file without reading it."""
    path = facts.path
    status = os.fstat(descriptor)
    device = stat.S_ISBLK(status.st_mode)
    size = os.lseek(descriptor, 0, os.SEEK_END) if device else status.st_size
    generation = boot() if device else generation_of(descriptor)
    identity = Identity(status.st_dev, status.st_ino, size, status.st_mtime_ns, generation=generation)
    return replace(
        facts,
        identity=identity,
        file_size=size,
        allocated=size if device else status.st_blocks * 512,
        links=status.st_nlink,
        block_device=device,
        mode=stat.S_IMODE(status.st_mode) & 0o777,
        group=status.st_gid,
        writable=os.access(path, os.W_OK),
        removable=os.access(os.path.dirname(path), os.W_OK | os.X_OK),
    )


def _read(descriptor: int, facts: LayerFacts, image_format: str | None) -> LayerFacts:
    path, size = facts.path, facts.file_size
    if image_format is None:
        image_format = guess_format(path, os.pread(descriptor, 4, 0))
        if image_format is None and path.lower().endswith(QCOW2_ENDINGS):
            return replace(facts, problem="not-qcow2", detail=f"{path} is not a qcow2 image, although its name says so")
        if image_format is None:
            return replace(facts, problem="unknown-format", detail=f"the format of {path} is not known from its name")
    if image_format != "qcow2":
        return replace(facts, format=image_format, virtual_size=-(-size // 512) * 512, written=True, cluster_size=65536)
    try:
        header = read_header(descriptor, path)
        return _qcow2(descriptor, facts, header)
    except SnaptreeError as error:
        word = "not-qcow2" if not is_qcow2(os.pread(descriptor, 4, 0)) else "damaged"
        return replace(facts, problem=word, detail=error.message)


def _qcow2(descriptor: int, facts: LayerFacts, header: Header) -> LayerFacts:
    path, identity = facts.path, facts.identity
    assert identity is not None
    entries = read_internals(descriptor, header, path)
    bitmaps = read_bitmaps(descriptor, header, path)
    facts = replace(
        facts,
        format="qcow2",
        identity=replace(identity, header=header_hash(descriptor, header)),
        version=header.version,
        virtual_size=header.virtual_size,
        cluster_size=header.cluster_size,
        refcount_bits=header.refcount_bits,
        backing=header.backing,
        backing_format=header.backing_format if header.backing is not None else None,
        dirty=header.dirty,
        corrupt=header.corrupt,
        encrypted=header.encrypted,
        luks=luks_id(descriptor, header, path),
        external_data=header.external_data,
        extended_l2=header.extended_l2,
        lazy_refcounts=header.lazy_refcounts,
        autoclear=bool(header.autoclear),
        compression=header.compression,
        bitmaps=bitmaps,
        internals=tuple(entry.facts for entry in entries),
    )
    if header.corrupt:
        return replace(facts, problem="corrupt", detail=f"{path} is marked as corrupt by QEMU")
    if header.external_data:
        return replace(facts, problem="external-data", detail=f"{path} keeps its data in another file")
    if header.l1_table_offset + header.l1_size * 8 > facts.file_size:
        return replace(facts, problem="truncated", detail=f"{path} is cut: its L1 table lies past its end")
    written = bool(entries or bitmaps) or _any_allocated(descriptor, header)
    same = _unchanged_since(descriptor, header, entries)
    return replace(facts, written=written, unchanged_since=same)


def _any_allocated(descriptor: int, header: Header) -> bool:
    """Whether any L1 entry is in use."""
    at, left = header.l1_table_offset, header.l1_size * 8
    while left > 0:
        data = os.pread(descriptor, min(left, _CHUNK), at)
        if data.strip(b"\0"):
            return True
        if not data:
            return False
        at += len(data)
        left -= len(data)
    return False


def _unchanged_since(descriptor: int, header: Header, entries: tuple[InternalEntry, ...]) -> tuple[str, ...]:
    """The internal snapshots whose L1 table is the active one's: nothing was written since they were taken.

    The first write after an internal snapshot copies the L2 table that it changes, so equal tables mean no write. Where
    there is more to compare than is reasonable the answer is "written", which costs a layer and loses nothing.
    """
    same: list[str] = []
    left = _COMPARED
    active: bytes | None = None
    for entry in entries:
        left -= entry.l1_size * 8
        if left < 0:
            break
        if entry.facts.virtual_size != header.virtual_size:
            continue
        if active is None:
            active = _l1(descriptor, header.l1_table_offset, header.l1_size)
        if _l1(descriptor, entry.l1_table_offset, entry.l1_size) == active:
            same.append(entry.facts.name)
    return tuple(same)


def shows_point(path: str, tag: str) -> bool:
    """Whether the active state of a qcow2 image has the size and the L1 table of the internal snapshot of that name.

    :raise SnaptreeError: the image is damaged.
    """
    descriptor = open_to_read(path)
    try:
        header = read_header(descriptor, path)
        entries = read_internals(descriptor, header, path)
        entry = next((each for each in entries if each.facts.name == tag), None)
        if entry is None or entry.facts.virtual_size != header.virtual_size:
            return False
        active = _l1(descriptor, header.l1_table_offset, header.l1_size)
        return _l1(descriptor, entry.l1_table_offset, entry.l1_size) == active
    finally:
        os.close(descriptor)


def _l1(descriptor: int, offset: int, entries: int) -> bytes:
    """The L1 table without its flags and without the unused entries at its end."""
    data = os.pread(descriptor, entries * 8, offset)
    data = data[: len(data) // 8 * 8]
    mask = int.from_bytes(_OFFSET.to_bytes(8, "big") * (len(data) // 8), "big")
    masked = (int.from_bytes(data, "big") & mask).to_bytes(len(data), "big").rstrip(b"\0")
    return masked.ljust(-(-len(masked) // 8) * 8, b"\0")
