"""How a running QEMU has opened an image: what to say again when its node is reopened, or opened once more.

``blockdev-reopen`` resets every option that it is not told, and the monitor tells only of the cache and of
``detect-zeroes``. The others stand in the command line, with ``-blockdev`` or ``-drive``, or are those that snaptree
opens images with; what QEMU has opened because a header names it has none of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from snaptree.qemu.graph import BlockGraph, Node

OWN = re.compile(r"s[tvw]\d+-[0-9a-f-]+")
"""The names of nodes that snaptree has opened: at the start, for a snapshot, or for a merge."""
_OVERLAY = re.compile(r"st\d+-")
_WORDS = frozenset({"aio", "detect-zeroes", "discard", "locking"})
"""Options whose ``on`` and ``off`` are words in JSON, too, being two of several."""
_OWN, _THEIRS = "file", "f"
_DRIVE, _BENEATH, _HEADER = "d", "e", "h"
"""How the file's node is named of what was opened like the image of a ``-drive``, like one beneath that, or like one
that a header names; with the number of the ``-drive``."""
_OF_DEVICE = frozenset(
    {
        "id",
        "if",
        "bus",
        "unit",
        "index",
        "media",
        "format",
        "driver",
        "serial",
        "addr",
        "werror",
        "rerror",
        "group",
        "file",
        "cache",
        "detect-zeroes",
        "readonly",
        "read-only",
    }
)
"""Options of a ``-drive`` that are the device's, or that the monitor tells."""
_OF_IMAGE = frozenset(
    {
        "discard",
        "l2-cache-size",
        "l2-cache-entry-size",
        "refcount-cache-size",
        "cache-size",
        "cache-clean-interval",
        "lazy-refcounts",
        "pass-discard-request",
        "pass-discard-snapshot",
        "pass-discard-other",
        "discard-no-unref",
        "encrypt",
    }
)
_SIZE = re.compile(r"(\d+)([bkmgt]?)", re.IGNORECASE)
_SIZES = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def options_of(graph: BlockGraph, node: Node, words: Sequence[str]) -> dict[str, Any] | None:
    """The image's options, with those of its file under ``file``; ``None`` when they are not known.

    What stands beneath it is left out.

    :param words: the command line that started QEMU.
    """
    file = graph.file_of(node)
    if node.driver != "qcow2" or file is node or graph.nodes[node.file or ""] is not file:
        return None
    like = _drive_of(graph, node, file, words)
    if like is not None:
        found = _like_drive(*like, _drives(words))
    elif is_unnamed(node):
        found = None
    else:
        found = _like_named(node, file, _named(words))
    if found is None or found["file"].setdefault("driver", file.driver) != file.driver:
        return None
    for options, each in ((found, node), (found["file"], file)):
        options["cache"] = dict(each.cache)
        if like is None or like[0] != _DRIVE or options is not found:
            options["detect-zeroes"] = each.detect_zeroes
    if node.encrypted:
        secret = found.get("encrypt", {}).get("key-secret") or node.secret
        if secret not in graph.keys:
            return None
        found["encrypt"] = {"format": "luks", "key-secret": secret}
    found["read-only"] = node.read_only
    return found


def _like_named(node: Node, file: Node, named: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The options of an image that was opened by its name: with ``-blockdev``, or by snaptree."""
    source = _source(node, file, list(named))
    if source is None:
        return {"driver": "qcow2", "discard": "unmap", "file": {"discard": "ignore", "node-name": _OWN}}
    if source not in named:
        return None
    found = {key: value for key, value in named[source].items() if key != "backing"}
    inner = found.get("file")
    inner = named.get(inner, {}) if isinstance(inner, str) else inner
    if not isinstance(inner, dict) or "driver" not in inner:
        return None
    return {**found, "file": {**inner, "node-name": f"{_THEIRS}{list(named).index(source)}"}}


def _source(node: Node, file: Node, named: Sequence[str]) -> str | None:
    """The node of the command line that the image was opened like; ``None`` when it was like snaptree's own.

    What snaptree opened in the place of another says it in the name of its file's node: a later reopen needs it, too.
    """
    if not OWN.fullmatch(node.name):
        return node.name
    number = file.name.removeprefix(f"{node.name}-{_THEIRS}")
    if number == file.name or not number.isdigit():
        return None
    return named[int(number)] if int(number) < len(named) else ""


def is_unnamed(node: Node) -> bool:
    """Whether QEMU has made up the node's name: it takes it in no ``blockdev-reopen``."""
    return node.name.startswith("#")


def _drive_of(graph: BlockGraph, node: Node, file: Node, words: Sequence[str]) -> tuple[str, int] | None:
    """Like what the image was opened: the image of a ``-drive``, with its number among these, one beneath that, or one
    that a header names; ``None`` when it was by its name, or nobody knows.
    """
    if not is_unnamed(node):
        like = re.fullmatch(rf"{re.escape(node.name)}-([{_DRIVE}{_BENEATH}{_HEADER}])(\d+)", file.name)
        return (like[1], int(like[2])) if like is not None and OWN.fullmatch(node.name) else None
    above = [node]
    while parents := [each for each in map(graph.nodes.__getitem__, above[-1].above) if each.backing == above[-1].name]:
        above.append(parents[0])
    for number, drive in enumerate(_drives(words)):
        for each in above:
            if _opens(drive, graph.file_of(each).path or ""):
                return (_DRIVE if each is node else _BENEATH), number
    # What snaptree has put an overlay on was somebody's tip, and not opened because a header names it.
    return (_HEADER, 0) if len(above) > 1 and not _OVERLAY.match(above[1].name) else None


def _opens(drive: Mapping[str, Any], path: str) -> bool:
    """Whether the ``-drive`` opens the file; a name may start from QEMU's working folder."""
    named = drive.get("file")
    name = str(named.get("filename", "") if isinstance(named, dict) else named or "")
    return bool(name) and (path == name or (not name.startswith("/") and path.endswith(f"/{name}")))


def _like_drive(like: str, number: int, drives: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The options of an image that was opened so; ``None`` when there are some that are not understood."""
    found: dict[str, Any] = {"driver": "qcow2", "discard": "unmap"}
    file: dict[str, Any] = {"discard": "unmap", "node-name": f"{like}{number}"}
    if like != _HEADER:
        if number >= len(drives):
            return None
        drive = drives[number]
        if "aio" in drive:
            file["aio"] = drive["aio"]
        if like == _DRIVE:
            found |= {key: drive[key] for key in _OF_IMAGE if key in drive}
            # QEMU (10.0.2) forgets it when it reopens the image to read, as for a snapshot.
            found["detect-zeroes"] = drive.get("detect-zeroes", "off")
            if isinstance(inner := drive.get("file"), dict):
                file |= {key: value for key, value in inner.items() if key not in ("filename", "driver", "node-name")}
            if set(drive) - _OF_DEVICE - _OF_IMAGE - {"aio"}:
                return None
    return {**found, "file": file}


def _drives(words: Sequence[str]) -> list[dict[str, Any]]:
    """What the command line opens with ``-drive``."""
    return [_parsed(word) for before, word in pairwise(words) if before in ("-drive", "--drive")]


def reopened(node: Node, options: Mapping[str, Any], backing: str) -> dict[str, Any]:
    """How to reopen the node on another backing node, with everything else as it is."""
    return {**options, "node-name": node.name, "file": node.file, "backing": backing}


def opened_anew(options: Mapping[str, Any], path: str, name: str, backing: str | None) -> dict[str, Any]:
    """How to open another file as the image is open, read-only until QEMU has to write to it."""
    file = {
        **options["file"],
        "filename": path,
        "node-name": f"{name}-{options['file']['node-name']}",
        "read-only": False,
        "auto-read-only": True,
    }
    return {**options, "node-name": name, "file": file, "backing": backing, "read-only": True}


def _named(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the command line opens with ``-blockdev``, by the names of the nodes."""
    found: dict[str, dict[str, Any]] = {}
    for before, word in pairwise(words):
        if before not in ("-blockdev", "--blockdev"):
            continue
        within: list[Any] = [_parsed(word)]
        while within:
            options = within.pop()
            if isinstance(options, dict):
                if isinstance(name := options.get("node-name"), str):
                    found[name] = options
                within += [options.get("backing"), options.get("file")]
    return found


def _parsed(word: str) -> dict[str, Any]:
    if word.startswith("{"):
        try:
            found = json.loads(word)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}
    options: dict[str, Any] = {}
    # A comma in a value is doubled.
    for number, part in enumerate(re.findall(r"(?:[^,]|,,)+", word)):
        key, equals, value = part.partition("=")
        if not equals and not number:
            # The first may be the driver alone.
            key, value = "driver", key
        *outer, last = key.split(".")
        at = options
        for each in outer:
            at = at.setdefault(each, {})
            if not isinstance(at, dict):
                return {}
        value = value.replace(",,", ",")
        at[last] = value if last in _WORDS else _typed(value)
    return options


def _typed(value: str) -> Any:
    """A value as JSON has it: in a command line all are words."""
    if value in ("on", "off"):
        return value == "on"
    size = _SIZE.fullmatch(value)
    return int(size[1]) << _SIZES[size[2].lower()] if size else value
