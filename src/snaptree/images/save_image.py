"""Memories as libvirt saves them: whether a file is one, and whole; and one thing that libvirt writes wrong in them.

libvirt writes a header (``struct _virQEMUSaveHeader`` in its ``qemu_saveimage.h``), the domain's XML, and then what
QEMU gives it. It says in the header's first word whether it has come to the end, and does not find out when it loads
the file that some of it has been cut off since: QEMU does, when the guest of before is gone already.

With ``snapshot_image_format = "sparse"`` libvirt 11.3 says of a snapshot's memory that it is sparse, and has QEMU write
it as a plain stream. ``virsh snapshot-revert`` does not mind, ``virsh restore`` fails, and the guest of before is gone.
"""

from __future__ import annotations

import os
import struct

from snaptree.images import durable
from snaptree.images.facts import open_to_read

_WHOLE, _PART = b"LibvirtQemudSave", b"LibvirtQemudPart"
_HEADER = struct.Struct("=16s5I56x")
_FORM_AT = 28
_RAW, _SPARSE = 0, 6
"""The forms in which QEMU's own words follow; the others are compressed."""
_STREAM = b"QEVM"
_MAPPED_RAM = b"mapped-ram"
"""What QEMU names among its capabilities near the beginning of a stream whose memory is sparse."""
_BEGINNING_BYTES = 4096
_END = b"\x00\x06"
"""QEMU's end of the sections, and the beginning of its description of them, which is the last that it writes."""
_TAIL_BYTES = 4 << 20
MAX_XML = 1 << 26


def problem_of(path: str) -> str:
    """What is wrong with the memory of libvirt's at the path, as a sentence; empty when it is one, and whole."""
    try:
        descriptor = open_to_read(path)
    except OSError as error:
        return f"the memory file {path} cannot be read: {error.strerror or error}"
    try:
        return problem(descriptor, path)
    finally:
        os.close(descriptor)


def problem(descriptor: int, path: str) -> str:
    """What is wrong with an open memory of libvirt's, as a sentence; empty when it is one, and whole."""
    size = os.fstat(descriptor).st_size
    head = os.pread(descriptor, _HEADER.size, 0)
    if len(head) < _HEADER.size:
        return f"the memory file {path} is cut: it has {size} bytes"
    magic, _, length, _, form, _ = _HEADER.unpack(head)
    if magic == _PART:
        return f"the memory file {path} was never written to its end"
    if magic != _WHOLE or length > MAX_XML:
        return f"the memory file {path} is no memory that libvirt has saved"
    if form not in (_RAW, _SPARSE):
        return ""
    begins = _HEADER.size + length
    stream = os.pread(descriptor, _BEGINNING_BYTES, begins)
    if len(stream) >= len(_STREAM) and not stream.startswith(_STREAM):
        return f"the memory file {path} is no memory that libvirt has saved"
    if _is_mislabelled(form, stream):
        why = "as libvirt writes those of snapshots where they are to be"
        return (
            f"the memory file {path} says that it is sparse, and is not, {why}: only 'virsh snapshot-revert' loads it"
        )
    start = max(begins, size - _TAIL_BYTES)
    if begins >= size or not _ends(os.pread(descriptor, size - start, start)):
        return f"the memory file {path} is cut: its {size} bytes have no end"
    return ""


def _is_mislabelled(form: int, stream: bytes) -> bool:
    """Whether a memory says that it is sparse, and the beginning of QEMU's stream does not."""
    return form == _SPARSE and stream.startswith(_STREAM) and _MAPPED_RAM not in stream


def put_form_right(path: str) -> None:
    """Let a memory that has just been saved, and says that it is sparse and is not, say what it is.

    It is not synced, and has been written when it was before: when it was saved tells whether disks are of that time.

    :raise IoError: it cannot be read or written.
    """
    if not os.path.exists(path):
        return
    with durable.opened_for_writing(path) as descriptor:
        status, head = os.fstat(descriptor), os.pread(descriptor, _HEADER.size, 0)
        if len(head) < _HEADER.size:
            return
        magic, _, length, _, form, _ = _HEADER.unpack(head)
        if magic != _WHOLE or length > MAX_XML:
            return
        if _is_mislabelled(form, os.pread(descriptor, _BEGINNING_BYTES, _HEADER.size + length)):
            durable.write_in_place(descriptor, _FORM_AT, struct.pack("=I", _RAW), path)
            os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))


def _ends(tail: bytes) -> bool:
    """Whether QEMU's description of what it has written is at the very end, as long as it says."""
    at = len(tail)
    while (at := tail.rfind(_END, 0, at)) >= 0:
        length = tail[at + 2 : at + 6]
        if len(length) == 4 and at + 6 + int.from_bytes(length, "big") == len(tail):
            return True
    return False
