"""The LUKS header of an encrypted qcow2 image: which one it is, and what a new overlay takes over of it.

Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU ("Full disk encryption header pointer"), and the
LUKS on-disk format, version 1. The header has the master key, locked once for each passphrase. A sector's place in the
file is part of how it is encrypted, so that data of one cluster means nothing anywhere else: only QEMU, with a
passphrase, can move it. An overlay with the same header opens with the same passphrases, and none is needed to make it.
"""

from __future__ import annotations

import hashlib
import os
import struct

from msgspec import Struct

from snaptree.errors import UnhealthyError
from snaptree.images.header import CRYPT_LUKS, EXTENSION_ENCRYPTION, MAX_OFFSET, Header

MAX_BYTES = 16 << 20
"""QEMU's have some 2 MiB: eight places for passphrases of 256 KiB each."""
_MAGIC = b"LUKS\xba\xbe\x00\x01"
_FIXED = 592
"""So many bytes a LUKS header has before the first key: all that says which passphrases open it."""
_PAYLOAD, _TURNS, _SLOTS, _SLOT, _ACTIVE = 104, 164, 208, 48, 0x00AC71F3
"""Where it says how long it is and how long a key, how often the digest of the master key is hashed, and where its
eight places for passphrases are. Each of these says whether it is in use, how often what is tried is hashed, and where
in the header the locked key is, in how many stripes."""
_MOST = 100_000_000
"""QEMU counts up to some millions to take two seconds for it."""
_PIECE = 4096


class LuksHeader(Struct, frozen=True):
    """A LUKS header: its length in bytes, and what of it is not zeroes, by the place within it."""

    length: int
    pieces: tuple[tuple[int, bytes], ...]


def luks_id(descriptor: int, header: Header, path: str) -> str:
    """What tells a LUKS header from all others, as 32 hexadecimal digits; empty without one.

    It changes with the passphrases that open it: of two images with the same, one key opens both or neither.

    :param path: for messages.
    :raise UnhealthyError: the image says that it is encrypted so, and has no such header.
    """
    if header.crypt_method != CRYPT_LUKS:
        return ""
    _, _, fixed = _found(descriptor, header, path)
    return hashlib.sha256(fixed).hexdigest()[:32]


def read_luks(descriptor: int, header: Header, path: str) -> LuksHeader:
    """The LUKS header of an image that is encrypted so.

    :raise UnhealthyError: it has none, or is damaged.
    """
    if header.crypt_method != CRYPT_LUKS:
        raise UnhealthyError(f"{path} has no LUKS header any more", "see what was done to it")
    offset, length, _ = _found(descriptor, header, path)
    data = os.pread(descriptor, length, offset)
    pieces = ((at, data[at : at + _PIECE]) for at in range(0, length, _PIECE))
    return LuksHeader(length, tuple((at, piece) for at, piece in pieces if piece.strip(b"\0")))


def _found(descriptor: int, header: Header, path: str) -> tuple[int, int, bytes]:
    """Offset and length of the LUKS header in the file, in bytes, and its fixed part."""
    told = header.extension(EXTENSION_ENCRYPTION)
    if told is None or len(told) != 16:
        raise _bad(path, "it does not say where its LUKS header is")
    offset, length = struct.unpack(">QQ", told)
    if not offset or offset % header.cluster_size or offset >= MAX_OFFSET or not _FIXED <= length <= MAX_BYTES:
        raise _bad(path, f"a LUKS header of {length} bytes at {offset}")
    fixed = os.pread(descriptor, _FIXED, offset)
    if len(fixed) < _FIXED or not fixed.startswith(_MAGIC):
        raise _bad(path, f"no LUKS header of version 1 at {offset}")
    sectors, key_bytes = struct.unpack_from(">II", fixed, _PAYLOAD)
    slots = [struct.unpack_from(">II32xII", fixed, at) for at in range(_SLOTS, _FIXED, _SLOT)]
    used = [(turns, place * 512 + key_bytes * stripes) for active, turns, place, stripes in slots if active == _ACTIVE]
    if sectors * 512 > length or any(end > length for _, end in used):
        raise _bad(path, "its LUKS header is cut")
    if sum(turns for turns, _ in used) + struct.unpack_from(">I", fixed, _TURNS)[0] > _MOST:
        raise _bad(path, "its LUKS header takes minutes to be tried with a passphrase")
    # The file may end within its last cluster, but not before the last byte.
    if not os.pread(descriptor, 1, offset + length - 1):
        raise _bad(path, "the file ends within its LUKS header")
    return offset, length, fixed


def _bad(path: str, what: str) -> UnhealthyError:
    return UnhealthyError(f"{path} is damaged: {what}", "restore it from a backup")
