"""How a running QEMU has opened an image: what to say again when its node is reopened, or opened once more.

``blockdev-reopen`` resets every option that it is not told, and the monitor tells only of the cache and of
``detect-zeroes``. The others stand in the command line, or are those that snaptree opens images with.
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
_WORDS = frozenset({"aio", "detect-zeroes", "discard", "locking"})
"""Options whose ``on`` and ``off`` are words in JSON, too, being two of several."""
_OWN, _THEIRS = "file", "f"
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
    named = _named(words)
    source = _source(node, file, list(named))
    if source is None:
        found: dict[str, Any] = {
            "driver": "qcow2",
            "discard": "unmap",
            "file": {"driver": file.driver, "discard": "ignore", "node-name": _OWN},
        }
    else:
        if source not in named:
            return None
        found = {key: value for key, value in named[source].items() if key != "backing"}
        inner = found.get("file")
        found["file"] = dict(named.get(inner, {})) if isinstance(inner, str) else inner
        if not isinstance(found["file"], dict) or found["file"].get("driver") != file.driver:
            return None
        found["file"] = {**found["file"], "node-name": f"{_THEIRS}{list(named).index(source)}"}
    for options, each in ((found, node), (found["file"], file)):
        options["cache"] = dict(each.cache)
        options["detect-zeroes"] = each.detect_zeroes
    found["read-only"] = node.read_only
    return found


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
