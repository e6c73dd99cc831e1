"""Files with a machine's memory: what they look like, so that one that was changed or cut is found before use."""

from __future__ import annotations

import hashlib
import os

from snaptree.images import save_image
from snaptree.images.facts import open_to_read
from snaptree.images.inode import generation_of
from snaptree.model.layer import Identity
from snaptree.model.memory import LIBVIRT, Memory

_END_BYTES = 64 << 10
"""So much of each end is hashed: reading gigabytes would take as long as loading them."""


def identity_at(descriptor: int) -> Identity:
    """What an open memory file looks like."""
    status = os.fstat(descriptor)
    ends = hashlib.sha256(os.pread(descriptor, _END_BYTES, 0))
    ends.update(os.pread(descriptor, _END_BYTES, max(0, status.st_size - _END_BYTES)))
    return Identity(
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        header=ends.hexdigest(),
        generation=generation_of(descriptor),
    )


def identity_of(path: str) -> Identity:
    """What the memory file at the path looks like.

    :raise OSError: it cannot be read.
    """
    descriptor = open_to_read(path)
    try:
        return identity_at(descriptor)
    finally:
        os.close(descriptor)


def ailment(memory: Memory) -> str:
    """What is wrong with a memory's file, as a sentence; empty when it is as it was written.

    One that was moved away and back, or restored from a backup, is as good: it is known by what it holds.
    """
    try:
        descriptor = open_to_read(memory.path)
        try:
            now = identity_at(descriptor)
            broken = save_image.problem(descriptor, memory.path) if memory.form == LIBVIRT else ""
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return f"the memory file {memory.path} is not there"
    except OSError as error:
        return f"the memory file {memory.path} cannot be read: {error.strerror or error}"
    if now.size < memory.size:
        return f"the memory file {memory.path} is cut: it has {now.size} of {memory.size} bytes"
    if now.size != memory.size or (memory.identity is not None and now.header != memory.identity.header):
        return f"the memory file {memory.path} is not the one that was written"
    kept = memory.identity
    # A file that was put back may have been given the number of the one that was taken away; not its generation.
    same = kept is not None and (now.inode, now.generation) == (kept.inode, kept.generation)
    if kept is not None and same and now.mtime_ns != kept.mtime_ns:
        return f"the memory file {memory.path} was written to since"
    return broken
