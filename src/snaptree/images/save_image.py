"""Memories as libvirt saves them: whether a file is one, and whole.

libvirt writes a header (``struct _virQEMUSaveHeader`` in its ``qemu_saveimage.h``), the domain's XML, and then what
QEMU gives it. It says in the header's first word whether it has come to the end, and does not find out when it loads
the file that some of it has been cut off since: QEMU does, when the guest of before is gone already.
"""

from __future__ import annotations

import os
import struct

from snaptree.images.facts import open_to_read

_WHOLE, _PART = b"LibvirtQemudSave", b"LibvirtQemudPart"
_HEADER = struct.Struct("=16s5I56x")
_RAW = 0
"""The form in which QEMU's own words follow; the others are compressed."""
_STREAM = b"QEVM"
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
    if form != _RAW:
        return ""
    begins = _HEADER.size + length
    stream = os.pread(descriptor, len(_STREAM), begins)
    if len(stream) == len(_STREAM) and stream != _STREAM:
        return f"the memory file {path} is no memory that libvirt has saved"
    start = max(begins, size - _TAIL_BYTES)
    if begins >= size or not _ends(os.pread(descriptor, size - start, start)):
        return f"the memory file {path} is cut: its {size} bytes have no end"
    return ""


def _ends(tail: bytes) -> bool:
    """Whether QEMU's description of what it has written is at the very end, as long as it says."""
    at = len(tail)
    while (at := tail.rfind(_END, 0, at)) >= 0:
        length = tail[at + 2 : at + 6]
        if len(length) == 4 and at + 6 + int.from_bytes(length, "big") == len(tail):
            return True
    return False
