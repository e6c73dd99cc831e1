"""Real images, made, written and read by QEMU's own programs: what they say is the truth of the tests."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.kit import luks

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def run(*arguments: str | Path, good: Sequence[int] = (0,)) -> str:
    """Run a program to its end; what it printed."""
    done = subprocess.run([str(each) for each in arguments], capture_output=True, text=True, check=False)
    if done.returncode not in good:
        raise AssertionError(f"{' '.join(map(str, arguments))} gave {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def quoted(path: str | Path) -> str:
    """The path as an argument that QEMU takes for a file, whatever characters it has."""
    return "json:" + json.dumps({"driver": "file", "filename": str(path)})


def create(
    path: str | Path,
    size: int,
    image_format: str = "qcow2",
    *,
    backing: tuple[str | Path, str] | None = None,
    **options: Any,
) -> Path:
    """Make an image; options as QEMU's (``cluster_size``, ``compat``, ``extended_l2``, ``luks.OPTIONS`` …)."""
    words: list[str | Path] = ["qemu-img", "create", "-q", "-f", image_format]
    if options:
        words += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
    below = ["-b", os.path.relpath(backing[0], Path(path).parent), "-F", backing[1]] if backing is not None else []
    if "encrypt.key-secret" not in options:
        run(*words, *below, path, str(size))
        return Path(path)
    words += [*luks.KEY, str(size)]
    Path(path).write_bytes(_made_once(*map(str, words)))
    if below:
        run("qemu-img", "rebase", "-q", "-u", *luks.opened(path, "qcow2", alone=True), *below)
    return Path(path)


@functools.cache
def _made_once(*words: str) -> bytes:
    """An encrypted image: QEMU takes seconds to find out how often it is to hash a passphrase."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        path = os.path.join(folder, "image")
        run(*words[:-1], path, words[-1])
        return Path(path).read_bytes()


def io(path: str | Path, image_format: str, *commands: str) -> None:
    """Give qemu-io commands such as ``write -P 0x41 0 64k``."""
    words: list[str | Path] = ["qemu-io", "-d", "unmap"]
    for command in commands:
        words += ["-c", command]
    said = run(*words, *luks.opened(path, image_format))
    assert "failed" not in said, said


def read(path: str | Path, image_format: str = "qcow2", tag: str | None = None) -> bytes:
    """All that the image shows the guest, or showed when the internal snapshot was taken."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        raw = os.path.join(folder, "raw")
        opened = luks.opened(path, image_format)
        if tag is not None:
            # QEMU reads an internal snapshot at the size that the disk has now: go back to it in a copy instead.
            image = os.path.join(folder, "copy")
            shutil.copy(path, image)
            facts = info(path)
            backing = facts.get("full-backing-filename")
            if opened[0] == "-f" and backing is not None:
                run("qemu-img", "rebase", "-q", "-u", "-b", backing, "-F", facts["backing-filename-format"], image)
            there = luks.opened(path, image_format, at=image) if opened[0] != "-f" else [image]
            words = ["qemu-img", "snapshot", "-a", tag, *there]
            if subprocess.run(words, capture_output=True, check=False).returncode == 0:
                opened, tag = there, None
        # Where an interrupted program has left reference counts between, it can be read but not gone back to.
        run("qemu-img", "convert", *_point(tag), "-O", "raw", *opened, raw)
        return Path(raw).read_bytes()


def _point(tag: str | None) -> list[str]:
    """The words that have an internal snapshot read."""
    return ["-l", f"snapshot.name={tag.replace(',', ',,')}"] if tag is not None else []


def read_unlocked(chain: Sequence[tuple[str, str]], tag: str | None = None) -> bytes:
    """All that a chain of ``(path, format)``, top first, shows while a QEMU works on it without changing that.

    :param tag: an internal snapshot of the top, taken when the disk was as long as it is now.
    """
    graph: dict[str, Any] | None = None
    for path, image_format in reversed(chain):
        below = {"backing": graph} if image_format == "qcow2" else {}
        graph = {**luks.graph_of(path, image_format, alone=True, locking=False), **below}
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        raw = os.path.join(folder, "raw")
        key = luks.KEY if luks.is_locked(graph) else []
        run("qemu-img", "convert", *key, *_point(tag), "-O", "raw", "json:" + json.dumps(graph), raw)
        return Path(raw).read_bytes()


def info(path: str | Path, image_format: str = "qcow2") -> dict[str, Any]:
    """What ``qemu-img info`` says of the one file, which a QEMU may have open."""
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "-U", "-f", image_format, "--output=json", path))
    return found


def own_data(path: str | Path, image_format: str = "qcow2") -> int:
    """How many bytes of data (not zeroes) the file has of its own."""
    return sum(length for _, length in own_extents(path, image_format))


def map_of(path: str | Path) -> list[dict[str, Any]]:
    """Where in the one qcow2 file its data lies: ``start`` (in the disk), ``offset`` (in the file), ``length``."""
    extents: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "--output=json", *_alone(path, "qcow2")))
    return [each for each in extents if each.get("offset") is not None and each["data"]]


def own_extents(path: str | Path, image_format: str = "qcow2") -> list[tuple[int, int]]:
    """Where the file has data (not zeroes) of its own, ``(start, length)``: ``qemu-img map`` of it alone."""
    extents = json.loads(run("qemu-img", "map", "--output=json", *_alone(path, image_format)))
    return [(each["start"], each["length"]) for each in extents if each["data"]]


def _alone(path: str | Path, image_format: str) -> list[str]:
    """The words that have a file opened by itself."""
    return luks.opened(path, image_format, alone=True)


def problems(path: str | Path) -> dict[str, int]:
    """What ``qemu-img check`` finds wrong in the one file (what it stands on is not opened); empty when it is sound."""
    said = run("qemu-img", "check", "--output=json", *_alone(path, "qcow2"), good=(0, 2, 3))
    found = json.loads(said)
    return {key: found[key] for key in ("corruptions", "leaks", "check-errors") if found.get(key)}
