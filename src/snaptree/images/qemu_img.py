"""Running qemu-img, on graphs that name every driver: it neither probes a format nor follows a header."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from snaptree.errors import CancelledError, NoSpaceError, ToolError
from snaptree.images.child import ends_with_us

Graph = dict[str, Any]


def find_tool(name: str) -> str:
    """The path of one of QEMU's programs.

    :raise ToolError: it is not installed.
    """
    found = shutil.which(name)
    if found is None:
        raise ToolError(f"{name} is not installed", "install QEMU's tools (qemu-utils on Debian and Ubuntu)")
    return found


def image_name(graph: Graph) -> str:
    """The graph as a file name for qemu-img."""
    return "json:" + json.dumps(graph)


def _fail(arguments: Sequence[str], said: str) -> Exception:
    line = next((each for each in said.strip().splitlines() if each), "it gave no reason")
    line = re.sub(r"json:\{.*?\}(?=[:'\s]|$)", "the image", line)
    if "No space left" in said or "Disk quota exceeded" in said:
        return NoSpaceError(f"qemu-img {arguments[0]} ran out of room: {line}", "free some room on that file system")
    return ToolError(f"qemu-img {arguments[0]} failed: {line}")


def _ended(words: Sequence[str], commands: str = "") -> subprocess.CompletedProcess[str]:
    """Run one of QEMU's programs to its end; it reads the commands and then the end of its input."""
    return subprocess.run(
        [find_tool(words[0]), *words[1:]],
        input=commands,
        capture_output=True,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=ends_with_us(),
        close_fds=False,
        check=False,
    )


def run(arguments: Sequence[str], *, good: Sequence[int] = (0,)) -> str:
    """Run qemu-img to its end; what it printed.

    :raise ToolError: it failed.
    """
    done = _ended(["qemu-img", *arguments])
    if done.returncode not in good:
        raise _fail(arguments, done.stderr)
    return done.stdout


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What ``qemu-img check`` counted. ``errors`` are wrong reference counts and worse, ``leaks`` lost clusters."""

    errors: int
    leaks: int
    repaired: int = 0


def check(graph: Graph, *, repair: str | None = None) -> CheckResult:
    """Check an image's reference counts and tables, and repair ``leaks`` or ``all`` if told so.

    :raise ToolError: it could not be checked.
    """
    repairing = ["-r", repair] if repair is not None else []
    said = run(["check", "--output=json", *repairing, image_name(graph)], good=(0, 2, 3))
    try:
        found = json.loads(said)
    except ValueError as error:
        raise ToolError(f"qemu-img check gave no answer: {said[:200]!r}") from error
    fixed = found.get("corruptions-fixed", 0) + found.get("leaks-fixed", 0)
    errors = found.get("corruptions", 0) + found.get("check-errors", 0)
    return CheckResult(errors, found.get("leaks", 0), fixed)


def snapshot_create(graph: Graph, tag: str) -> None:
    """Take an internal snapshot."""
    run(["snapshot", "-c", tag, image_name(graph)])


def snapshot_apply(graph: Graph, number: str) -> None:
    """Make the active state what the internal snapshot of that id shows, its size too."""
    run(["snapshot", "-a", number, image_name(graph)])


def snapshot_delete(graph: Graph, tag: str) -> None:
    """Delete the internal snapshot of that name."""
    run(["snapshot", "-d", tag, image_name(graph)])


def resize(graph: Graph, size: int, *, shrink: bool = False) -> None:
    """Give an image another size, in bytes; what a longer backing file would show past the old end is zeroed."""
    run(["resize", "-q", *(["--shrink"] if shrink else []), image_name(graph), str(size)])


def write_zeroes(graph: Graph, ranges: Sequence[tuple[int, int]]) -> None:
    """Write zeroes into an image, given as ``(start, length)`` in bytes, with ``qemu-io``.

    :raise ToolError: it failed.
    """
    commands = "".join(f"write -q -z {start} {length}\n" for start, length in ranges)
    done = _ended(["qemu-io", image_name(graph)], commands)
    # It prints what failed and goes on with the next command.
    if done.returncode != 0 or "failed" in done.stdout or done.stderr:
        raise _fail(["zeroes"], done.stderr or done.stdout)


def convert_point(
    source: Graph,
    point: tuple[str, str],
    target: Graph,
    *,
    progress: Callable[[float], None] = lambda done: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Copy what an internal snapshot has of its own into an empty overlay on the same backing file.

    :param point: id and name of the internal snapshot.
    :param progress: is told the part done, from 0 to 1.
    :raise CancelledError: ``cancelled`` said so; the target is worthless.
    """
    backing = source.get("backing")
    number, tag = (each.replace(",", ",,") for each in point)
    arguments = ["convert", "-p", "-n", "-O", "qcow2", "-l", f"snapshot.id={number},snapshot.name={tag}"]
    if backing is not None:
        arguments += ["-B", image_name(backing)]
    arguments += [image_name(source), image_name(target)]
    process = subprocess.Popen(
        [find_tool("qemu-img"), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=ends_with_us(),
        close_fds=False,
    )
    try:
        _follow(process, progress, cancelled)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    _, said = process.communicate()
    if process.returncode != 0:
        raise _fail(arguments, said.decode(errors="replace"))


def _follow(process: subprocess.Popen[bytes], progress: Callable[[float], None], cancelled: Callable[[], bool]) -> None:
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    while True:
        if cancelled():
            raise CancelledError("stopped while a new layer was being made")
        ready, _, _ = select.select([descriptor], [], [], 0.1)
        if not ready:
            continue
        data = os.read(descriptor, 4096)
        if not data:
            return
        parts = re.findall(rb"\((\d+(?:\.\d+)?)/100%\)", data)
        if parts:
            progress(float(parts[-1]) / 100)
