"""Bringing extents from some files into another: by copying, or by sharing blocks.

Copying is done by two threads with large buffers, with writing back under way meanwhile, so that the sync at the end
finds little to do; what has been copied leaves the page cache again. Holes stay holes.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from msgspec import Struct, field

from snaptree.errors import CancelledError, IoError
from snaptree.images import durable, write_back
from snaptree.images.mover import sharing
from snaptree.images.mover.limiting import Limiter
from snaptree.images.tables import data_ranges
from snaptree.images.workers import run_together

PIECE = 8 << 20
"""So much is copied by one call, and so often it is looked whether to stop, in bytes."""
BUFFER = 1 << 20
"""So much is read and written at once, in bytes."""
BATCH = 4 << 20
"""A thread takes pieces worth so much at once."""
BEHIND = 64 << 20
"""So much that was copied may be in the page cache and not on disk, in bytes."""
THREADS = 2
_NOT_SO = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ETXTBSY)

Extent = tuple[int, int, int, int]
"""``(file, from, to, length)``: which source, where in it, where in the target, and how much, in bytes."""


class Watch(Struct):
    """How a merge is followed and stopped: ``moved`` is told of each more bytes, by any thread."""

    moved: Callable[[int], None] = lambda count: None
    stopped: Callable[[], bool] = lambda: False
    limiter: Limiter = field(default_factory=Limiter)

    def check(self) -> None:
        """Stop, if it is to; while the work is held, wait.

        :raise CancelledError: it is to stop.
        """
        self.limiter.rest(self.stopped)
        if self.stopped():
            raise CancelledError("stopped while data was being moved")


class Mover:
    """Brings extents of the sources into the target.

    :param target: open for reading and writing, ``path`` names it in messages.
    :param share: share blocks instead of copying them.
    """

    def __init__(self, sources: Sequence[int], target: int, path: str, watch: Watch, *, share: bool) -> None:
        self.sources = sources
        self.target = target
        self.path = path
        self.watch = watch
        self.share = share
        self._sizes = [os.fstat(each).st_size or os.lseek(each, 0, os.SEEK_END) for each in sources]
        self._block = os.fstatvfs(target).f_bsize
        # Where it can share blocks the kernel does so, and copies nothing; where not, buffers are twice as fast.
        self._kernel_shares = not share and sharing.can_share(os.path.dirname(path))
        self._own = threading.local()
        self._lock = threading.Lock()
        self._behind: deque[Extent] = deque()
        self._late = 0

    def move(self, extents: Sequence[Extent], *, fresh: bool) -> None:
        """Bring them all over.

        :param fresh: where they go there is nothing yet: zeroes need no writing.
        :raise CancelledError: the watch said so.
        :raise IoError: a file cannot be read or written.
        :raise NoSpaceError: there is no room.
        """
        with durable.explained(self.path, "copy to"):
            if self.share:
                self._share_all(extents, fresh=fresh)
                return
            batches = (partial(self._copy_all, batch, fresh=fresh) for batch in _batches(extents))
            large = sum(extent[3] for extent in extents) > BATCH
            run_together(batches, THREADS - 1 if large else 0)

    def finish(self) -> None:
        """What was copied leaves the page cache: call it when all is on disk."""
        while self._behind:
            self._forget(self._behind.popleft())
        self._late = 0

    # ---- copying --------------------------------------------------------------------------------------------------

    def _copy_all(self, pieces: Sequence[Extent], *, fresh: bool) -> None:
        for piece in pieces:
            self._copy(piece, fresh=fresh)

    def _copy(self, piece: Extent, *, fresh: bool) -> None:
        source, at, to, length = piece
        self.watch.check()
        self.watch.limiter.wait(length, self.watch.stopped)
        self.watch.check()
        dirty = False
        for begin, end in self._data(source, at, at + length, to, fresh=fresh):
            dirty |= self._copy_range(self.sources[source], begin, to + begin - at, end - begin)
        self.watch.moved(length)
        if dirty:
            self._write_back(piece)

    def _data(self, source: int, start: int, end: int, to: int, *, fresh: bool) -> Iterator[tuple[int, int]]:
        """The ranges of the source that have data; what it has not is zeroed in the target, unless it is so."""
        at = start
        for begin, stop in (*data_ranges(self.sources[source], start, min(end, self._sizes[source])), (end, end)):
            if begin > at and not fresh:
                durable.write_zeroes(self.target, to + at - start, begin - at, self.path)
            if begin < stop:
                yield begin, stop
            at = stop

    def _copy_range(self, source: int, at: int, to: int, length: int) -> bool:
        """Copy the range; whether it is in the page cache now, and not in blocks that the kernel has shared."""
        dirty = False
        while length:
            count = self._by_kernel(source, at, to, length) if self._kernel_shares else 0
            if not count:
                dirty = True
                buffer = self._buffer()[: min(length, BUFFER)]
                count = os.preadv(source, [buffer], at)
                if not count:
                    raise IoError(f"a source of {self.path} became shorter while it was copied", "is it in use?")
                durable.write_all(self.target, to, buffer[:count])
            at, to, length = at + count, to + count, length - count
        return dirty

    def _by_kernel(self, source: int, at: int, to: int, length: int) -> int:
        try:
            return os.copy_file_range(source, self.target, length, at, to)
        except OSError as error:
            if error.errno not in _NOT_SO:
                raise
            return 0

    def _buffer(self) -> memoryview:
        """This thread's own, made once."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(bytearray(BUFFER))
        found: memoryview = self._own.buffer
        return found

    def _write_back(self, piece: Extent) -> None:
        """Begin to write it back, and let go of what was written back meanwhile."""
        _, _, to, length = piece
        write_back.begin(self.target, to, length)
        with self._lock:
            self._behind.append(piece)
            self._late += length
            old = []
            while self._late > BEHIND:
                old.append(self._behind.popleft())
                self._late -= old[-1][3]
        for each in old:
            write_back.wait(self.target, each[2], each[3])
            self._forget(each)

    def _forget(self, piece: Extent) -> None:
        source, at, to, length = piece
        os.posix_fadvise(self.sources[source], at, length, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(self.target, to, length, os.POSIX_FADV_DONTNEED)

    # ---- sharing --------------------------------------------------------------------------------------------------

    def _share_all(self, extents: Sequence[Extent], *, fresh: bool) -> None:
        shared = 0
        for extent in extents:
            self.watch.check()
            self._share(extent, fresh=fresh)
            shared += extent[3]
            if shared >= PIECE:
                # A range is shared in less time than it takes to tell of it.
                self.watch.moved(shared)
                shared = 0
        self.watch.moved(shared)

    def _share(self, extent: Extent, *, fresh: bool) -> None:
        source, at, to, length = extent
        size = self._sizes[source]
        whole = max(0, min(length, (size - at) // self._block * self._block))
        if whole:
            sharing.share_range(self.sources[source], at, whole, self.target, to, self.path)
        if whole < length:
            # The file ends within its last cluster.
            rest = os.pread(self.sources[source], length - whole, at + whole)
            if rest:
                durable.write_all(self.target, to + whole, rest)
            if not fresh and whole + len(rest) < length:
                durable.write_zeroes(self.target, to + whole + len(rest), length - whole - len(rest), self.path)


def _batches(extents: Sequence[Extent]) -> Iterator[list[Extent]]:
    """Pieces of the extents, some mebibytes at a time."""
    batch: list[Extent] = []
    size = 0
    for source, at, to, length in extents:
        for start in range(0, length, PIECE):
            piece = (source, at + start, to + start, min(PIECE, length - start))
            batch.append(piece)
            size += piece[3]
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
