"""Encrypted images: how QEMU's programs are told their key."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

PASSPHRASE = "open, sesame"
KEY = ["--object", f"secret,id=key,data={PASSPHRASE.replace(',', ',,')}"]
OPTIONS: dict[str, Any] = {"encrypt.format": "luks", "encrypt.key-secret": "key", "encrypt.iter-time": 10}
"""Of a new image; so little is done to hinder who guesses the passphrase that it opens at once."""


def key_file(folder: Path) -> Path:
    """A file with the key, in the folder."""
    path = folder / "key"
    path.write_text(PASSPHRASE)
    return path


def opened(path: str | Path, image_format: str, *, alone: bool = False, at: str = "") -> list[str]:
    """The words that have one of QEMU's programs open an image, with the key where it or one beneath is encrypted.

    :param alone: what is beneath is not opened.
    :param at: a copy of it elsewhere, which is opened in its place.
    """
    graph = graph_of(str(path), image_format, alone=alone)
    if at:
        graph["file"] = {"driver": "file", "filename": at}
    if not is_locked(graph) and not alone:
        return ["-f", image_format, str(path)]
    return [*(KEY if is_locked(graph) else []), "json:" + json.dumps(graph)]


def graph_of(path: str, image_format: str, *, alone: bool = False, locking: bool = True) -> dict[str, Any]:
    """An image and all that its headers name, or the image alone."""
    device = os.path.exists(path) and not os.path.isfile(path)
    file = {"driver": "host_device" if device else "file", "filename": path}
    graph: dict[str, Any] = {"driver": image_format, "file": file if locking else {**file, "locking": "off"}}
    if image_format != "qcow2":
        return graph
    with open(path, "rb") as reading:
        head = reading.read(4096)
    if len(head) >= 36 and head[32:36] == b"\0\0\0\2":
        graph["encrypt"] = {"format": "luks", "key-secret": "key"}
    if alone:
        return {**graph, "backing": None}
    if (below := _below(path, head)) is not None:
        graph["backing"] = graph_of(*below, locking=locking)
    return graph


def is_locked(graph: Any) -> bool:
    """Whether any image of a graph is encrypted."""
    return isinstance(graph, dict) and ("encrypt" in graph or is_locked(graph.get("backing")))


def _below(path: str, head: bytes) -> tuple[str, str] | None:
    """The image that another one's header names, and its format."""
    at, length = struct.unpack_from(">QI", head, 8)
    if not at:
        return None
    with open(path, "rb") as reading:
        reading.seek(at)
        name = os.fsdecode(reading.read(length))
    extension = struct.unpack_from(">I", head, 100)[0] if head[7] > 2 else 72
    form = "raw"
    while (kind := struct.unpack_from(">I", head, extension)[0]) != 0:
        size = struct.unpack_from(">I", head, extension + 4)[0]
        if kind == 0xE2792ACA:
            form = head[extension + 8 : extension + 8 + size].decode()
        extension += 8 + (size + 7) // 8 * 8
    return os.path.join(os.path.dirname(os.path.realpath(path)), name), form


def in_the_clear(folder: Path) -> set[str]:
    """The names of the files in which something lies that was written to a disk and was not encrypted, or the key."""
    known = [bytes([letter]) * 512 for letter in range(ord("a"), ord("z") + 1)] + [PASSPHRASE.encode()]
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "key"]
    return {path.name for path in files if any(each in path.read_bytes() for each in known)}
