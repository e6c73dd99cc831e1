"""A disk that keeps every write and flush that its file system makes, and the disks that a power cut can leave."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.disks import Disk
from tests.kit.fuse_disk import FLUSH, RECORD, WRITE

BLOCK = 4096
"""What a disk writes whole."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Request:
    """One request to the disk: ``data`` is where its bytes lie in the log, ``None`` when they are zeroes."""

    offset: int
    length: int
    data: int | None
    flush: bool


@dataclass(frozen=True, slots=True)
class State:
    """What a power cut can leave: all requests before ``flushed``, and these parts of what came after it.

    A part is a request and which of its bytes came through, from and to.
    """

    flushed: int
    parts: tuple[tuple[Request, int, int], ...] = ()


class LoggedDisk(Disk):
    """A disk behind a log, until :meth:`stop`."""

    def __init__(self, folder: Path, kind: str, size: int) -> None:
        super().__init__(folder, kind, size)
        self.log, self.first = folder / "log", folder / "first.disk"
        images.run("cp", self.path, self.first)
        self.log.touch()
        self._file = folder / "file"
        self._file.touch()
        words = [sys.executable, "-m", "tests.kit.fuse_disk", self.path, self.log, self._file]
        self._server = subprocess.Popen([*map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL)
        self._loop: Path | None = None
        try:
            self._loop = self._attach(size)
        except BaseException:
            self.stop()
            raise

    def _attach(self, size: int) -> Path:
        until = time.monotonic() + 20
        while self._file.stat().st_size != size:
            if self._server.poll() is not None or time.monotonic() > until:
                pytest.skip("FUSE cannot be used here")
            time.sleep(0.01)
        return Path(images.run("losetup", "--show", "-f", self._file).strip())

    @property
    def source(self) -> Path:
        return self._loop or self.path

    def requests(self) -> list[Request]:
        """What the file system has asked for so far."""
        found = []
        data = self.log.read_bytes()
        at = 0
        while at < len(data):
            offset, length, kind = RECORD.unpack_from(data, at)
            at += RECORD.size
            found.append(Request(offset, length, at if kind == WRITE else None, kind == FLUSH))
            at += length if kind == WRITE else 0
        return found

    def stop(self) -> None:
        """End the log; the disk is an ordinary file from now on."""
        if os.path.ismount(self.place):
            self.unmount()
        if self._loop is not None:
            images.run("losetup", "-d", self._loop)
            self._loop = None
        if os.path.ismount(self._file):
            images.run("umount", self._file)
        self._server.terminate()
        self._server.wait(20)


class Replay:
    """Makes the disks that a power cut can leave, in the order of the log.

    :param disk: has been stopped.
    """

    def __init__(self, disk: LoggedDisk, requests: Sequence[Request]) -> None:
        self.disk, self.requests = disk, requests
        self.flushed = disk.first
        self.made = disk.path
        self._applied, self._sum = 0, 0
        self._log = disk.log.open("rb")
        self._image = self.flushed.open("r+b")

    def know(self, state: State) -> int:
        """A number that disks have in common which are the same, byte for byte; states come in the order of the log."""
        assert state.flushed >= self._applied
        for request in self.requests[self._applied : state.flushed]:
            pages = self._changed({}, request, 0, request.length)
            self._sum ^= self._differing(pages)
            for number, page in pages.items():
                os.pwrite(self._image.fileno(), page, number * BLOCK)
        self._applied = state.flushed
        pages = {}
        for part in state.parts:
            self._changed(pages, *part)
        return self._sum ^ self._differing(pages)

    def make(self, state: State) -> None:
        """Put the state where the disk is."""
        self.know(state)
        images.run("cp", self.flushed, self.made)
        with self.made.open("r+b") as image:
            for request, start, end in state.parts:
                os.pwrite(image.fileno(), self._data(request, start, end), request.offset + start)

    def _data(self, request: Request, start: int, end: int) -> bytes:
        if request.data is None:
            return bytes(end - start)
        return os.pread(self._log.fileno(), end - start, request.data + start)

    def _changed(self, pages: dict[int, bytearray], request: Request, start: int, end: int) -> dict[int, bytearray]:
        """Write a part of a request into these pages of the disk; those that are not there yet are read."""
        data, at = memoryview(self._data(request, start, end)), request.offset + start
        while data:
            number, inside = divmod(at, BLOCK)
            if number not in pages:
                pages[number] = bytearray(os.pread(self._image.fileno(), BLOCK, number * BLOCK))
            count = min(BLOCK - inside, len(data))
            pages[number][inside : inside + count] = data[:count]
            data, at = data[count:], at + count
        return pages

    def _differing(self, pages: Mapping[int, bytes | bytearray]) -> int:
        """By how much the number changes when the disk has these pages."""
        found = 0
        for number, page in pages.items():
            before = os.pread(self._image.fileno(), BLOCK, number * BLOCK)
            if page != before:
                found ^= _digest(number, page) ^ _digest(number, before)
        return found

    def close(self) -> None:
        self._log.close()
        self._image.close()


def _digest(number: int, page: bytes | bytearray) -> int:
    return int.from_bytes(hashlib.blake2b(page, digest_size=16, key=number.to_bytes(8, "little")).digest(), "little")


def states(requests: Sequence[Request], start: int, chance: random.Random, samples: int) -> Iterator[State]:
    """Every flush point from ``start`` on, and after each some random choices of what was not flushed yet."""
    flushes = [number for number, request in enumerate(requests) if request.flush and number >= start]
    for number, flushed in enumerate([start, *flushes]):
        until = flushes[number] if number < len(flushes) else len(requests)
        since = [request for request in requests[flushed:until] if request.length]
        yield State(flushed)
        for _ in range(samples if since else 0):
            yield State(flushed, tuple(_some(since, chance)))


def _some(requests: Sequence[Request], chance: random.Random) -> Iterator[tuple[Request, int, int]]:
    """Each request came through, did not, or was torn between two blocks: file systems rely on those being whole."""
    likely = chance.choice([0.1, 0.5, 0.9])
    for request in requests:
        cuts = [0, *range(-request.offset % BLOCK, request.length, BLOCK), request.length]
        if chance.random() < likely:
            yield request, 0, request.length
        elif len(cuts) > 3 and chance.random() < 0.3:
            start, end = sorted(chance.sample(cuts, 2))
            yield request, start, end
