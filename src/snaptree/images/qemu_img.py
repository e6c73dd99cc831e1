"""Running qemu-img, on graphs that name every driver: it neither probes a format nor follows a header."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from msgspec import Struct

from snaptree.errors import BusyError, CancelledError, NoKeyError, NoSpaceError, ToolError
from snaptree.images.child import run_program
from snaptree.images.gate import blockdev, key_object
from snaptree.images.mover.limiting import Limiter

Graph = dict[str, Any]
Keys = Mapping[str, str]
"""The files with the keys of encrypted images, by the LUKS ids of these (``images/luks.py``)."""
NO_KEYS: Keys = {}


_LOCKED = re.compile(r'Failed to get (shared )?".*" lock')


def image_name(graph: Graph) -> str:
    """The graph as a file name for qemu-img."""
    return "json:" + json.dumps(graph)


def key_words(keys: Keys, *graphs: Graph) -> list[str]:
    """The words that give one of QEMU's programs the keys that it needs for the graphs.

    What is in a key's file is the passphrase, as QEMU's ``secret`` object reads it.

    :raise NoKeyError: one of them is not known.
    """
    needed = {name: path for graph in graphs for name, path in keys_for(graph, keys).items()}
    words = (["--object", f"secret,id={name},file={path.replace(',', ',,')}"] for name, path in needed.items())
    return [word for pair in words for word in pair]


def keys_for(graph: Graph, keys: Keys) -> dict[str, str]:
    """The objects that have the keys for a graph, by name, and the files of these keys.

    :raise NoKeyError: one of them is not known.
    """
    paths = {key_object(luks): path for luks, path in keys.items()}
    found: dict[str, str] = {}
    for path, name in _encrypted(graph):
        if name not in paths:
            raise no_key(path)
        found[name] = paths[name]
    return found


def no_key(path: str) -> NoKeyError:
    """An encrypted image's key is not known."""
    return NoKeyError(f"{path} is encrypted, and its key is not known", "give it with 'snaptree set', --key FILE")


def wrong_key(path: str, said: str) -> NoKeyError:
    """The key of an encrypted image does not open it, or cannot be read.

    :param said: what QEMU says.
    """
    return NoKeyError(f"the key of {path} does not open it ({said})", "give another with 'snaptree set', --key FILE")


def _is_about_key(said: str) -> bool:
    """Whether QEMU complains of a key."""
    return any(each in said for each in ("Invalid password", "Unable to read", "is not valid UTF-8"))


@contextmanager
def opening(path: str) -> Iterator[None]:
    """What a monitor says of a key, in a block in which an image is opened, is told as :func:`wrong_key`.

    :raise NoKeyError: the image's key does not open it.
    """
    try:
        yield
    except ToolError as error:
        if _is_about_key(error.message):
            raise wrong_key(path, error.message.rpartition(": ")[2]) from error
        raise


def _encrypted(graph: Graph) -> Iterator[tuple[str, str]]:
    """The encrypted images of a graph, and the names of the objects that have their keys."""
    at: Any = graph
    while isinstance(at, dict):
        if "encrypt" in at:
            yield at["file"]["filename"], at["encrypt"]["key-secret"]
        at = at.get("backing")


def require_opened(path: str, keys: Keys) -> None:
    """See that the key of an encrypted image opens it, which takes QEMU a second or two.

    :raise NoKeyError: it does not, or is not known.
    :raise ToolError: the image cannot be opened.
    """
    graph = blockdev(path, "qcow2", None, None, locking=False)
    done = run_program(["qemu-io", "-r", *key_words(keys, graph), "-c", "quit", image_name(graph)])
    if _is_about_key(done.err):
        raise wrong_key(path, done.err.strip().rpartition(": ")[2])
    if done.status != 0 or done.err:
        raise _fail(["open"], done.err)


def _fail(arguments: Sequence[str], said: str) -> Exception:
    lines = [each for each in said.strip().splitlines() if each]
    # Before it says why it stops it may have told of its work.
    line = next((each for each in lines if each.startswith("qemu-")), lines[0] if lines else "it gave no reason")
    line = re.sub(r"json:\{.*?\}(?=[:'\s]|$)", "the image", line)
    if "No space left" in said or "Disk quota exceeded" in said:
        return NoSpaceError(f"qemu-img {arguments[0]} ran out of room: {line}", "free some room on that file system")
    if _LOCKED.search(said):
        return BusyError(f"qemu-img {arguments[0]} failed: {line}", "stop what has the image open, then try again")
    if _is_about_key(said):
        return NoKeyError(f"qemu-img {arguments[0]} failed: {line}", "give another key with 'snaptree set', --key FILE")
    return ToolError(f"qemu-img {arguments[0]} failed: {line}")


# What qemu-img could not write when it closed an image it only prints, and reports success (qcow2_inactivate).
_LOST_AT_CLOSE = ("Failed to flush the", "Lost persistent bitmaps")


def run(
    arguments: Sequence[str],
    *,
    good: Sequence[int] = (0,),
    told: Callable[[bytes], None] = lambda data: None,
    complained: Callable[[bytes], None] = lambda data: None,
    cancelled: Callable[[], bool] = lambda: False,
    limiter: Limiter | None = None,
) -> str:
    """Run qemu-img to its end; what it printed.

    :param told: is given what it prints, as it comes.
    :param complained: is given what it complains, as it comes.
    :param limiter: while it is held the program is kept from running.
    :raise CancelledError: ``cancelled`` said so.
    :raise ToolError: it failed.
    """
    done = run_program(["qemu-img", *arguments], told=told, complained=complained, cancelled=cancelled, limiter=limiter)
    if done.status not in good or any(each in done.err for each in _LOST_AT_CLOSE):
        raise _fail(arguments, done.err)
    return done.out


class CheckResult(Struct, frozen=True):
    """What ``qemu-img check`` counted. ``errors`` are wrong reference counts and worse, ``leaks`` lost clusters."""

    errors: int
    leaks: int
    repaired: int = 0
    whole: bool = True
    """Not when it was ended because it had found so many errors; there are more then."""


MOST_ERRORS = 10_000
"""An image with so many errors is damaged beyond doubt. Many internal snapshots on one broken table have each of its
errors again, some millions of lines."""
_COUNTED = ("corruptions", "leaks", "corruptions-fixed", "leaks-fixed")


def check(graph: Graph, *, repair: str | None = None, keys: Keys = NO_KEYS) -> CheckResult:
    """Check an image's reference counts and tables, and repair ``leaks`` or ``all`` if told so.

    :raise BusyError: somebody has it open.
    :raise ToolError: it could not be checked.
    """
    repairing = ["-r", repair] if repair is not None else []
    seen = 0

    def complained(data: bytes) -> None:
        nonlocal seen
        seen += data.count(b"ERROR")

    def hopeless() -> bool:
        return repair is None and seen > MOST_ERRORS

    arguments = ["check", *key_words(keys, graph), "--output=json", *repairing, image_name(graph)]
    try:
        said = run(arguments, good=(0, 2, 3), complained=complained, cancelled=hopeless)
    except CancelledError:
        return CheckResult(seen, 0, whole=False)
    try:
        found = json.loads(said)
        counts = {key: int(found.get(key, 0)) for key in _COUNTED}
        errors = counts["corruptions"] + int(found["check-errors"])
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ToolError(f"qemu-img check gave no answer: {said[:200]!r}") from error
    return CheckResult(errors, counts["leaks"], counts["corruptions-fixed"] + counts["leaks-fixed"])


def snapshot_create(graph: Graph, tag: str, keys: Keys = NO_KEYS) -> None:
    """Take an internal snapshot."""
    run(["snapshot", *key_words(keys, graph), "-c", tag, image_name(graph)])


def snapshot_apply(graph: Graph, number: str, keys: Keys = NO_KEYS) -> None:
    """Make the active state what the internal snapshot of that id shows, its size too."""
    run(["snapshot", *key_words(keys, graph), "-a", number, image_name(graph)])


def snapshot_delete(graph: Graph, tag: str, keys: Keys = NO_KEYS) -> None:
    """Delete the internal snapshot of that name."""
    run(["snapshot", *key_words(keys, graph), "-d", tag, image_name(graph)])


def resize(graph: Graph, size: int, *, shrink: bool = False, keys: Keys = NO_KEYS) -> None:
    """Give an image another size, in bytes; what a longer backing file would show past the old end is zeroed."""
    words = ["-q", *(["--shrink"] if shrink else []), image_name(graph), str(size)]
    run(["resize", *key_words(keys, graph), *words])


def write_zeroes(graph: Graph, ranges: Sequence[tuple[int, int]], keys: Keys = NO_KEYS) -> None:
    """Write zeroes into an image, given as ``(start, length)`` in bytes, with ``qemu-io``.

    :raise ToolError: it failed.
    """
    commands = "".join(f"write -q -z {start} {length}\n" for start, length in ranges)
    done = run_program(["qemu-io", *key_words(keys, graph), image_name(graph)], commands)
    # It prints what failed and goes on with the next command.
    if done.status != 0 or "failed" in done.out or done.err:
        raise _fail(["zeroes"], done.err or done.out)


def convert_point(
    source: Graph,
    point: tuple[str, str],
    target: Graph,
    *,
    keys: Keys = NO_KEYS,
    progress: Callable[[float], None] = lambda done: None,
    cancelled: Callable[[], bool] = lambda: False,
    limiter: Limiter | None = None,
) -> None:
    """Copy what an internal snapshot has of its own into an empty overlay on the same backing file.

    :param point: id and name of the internal snapshot.
    :param progress: is told the part done, from 0 to 1.
    :param limiter: how fast it may be, as it is now; while it is held nothing is copied.
    :raise CancelledError: ``cancelled`` said so; the target is worthless.
    """
    backing = source.get("backing")
    number, tag = (each.replace(",", ",,") for each in point)
    arguments = ["convert", *key_words(keys, source, target), "-p", "-n", "-O", "qcow2"]
    arguments += ["-l", f"snapshot.id={number},snapshot.name={tag}"]
    if limiter is not None and limiter.speed > 0:
        arguments += ["-r", str(max(1, int(limiter.speed)))]
    if backing is not None:
        arguments += ["-B", image_name(backing)]
    arguments += [image_name(source), image_name(target)]

    def told(data: bytes) -> None:
        parts = re.findall(rb"\((\d+(?:\.\d+)?)/100%\)", data)
        if parts:
            progress(float(parts[-1]) / 100)

    run(arguments, told=told, cancelled=cancelled, limiter=limiter)
