"""How an image is open, read from the command line that started QEMU."""

from __future__ import annotations

import json
from typing import Any

import pytest

from snaptree.qemu.graph import BlockGraph, Node
from snaptree.qemu.options import opened_anew, options_of

TREE = {
    "driver": "qcow2",
    "node-name": "top",
    "lazy-refcounts": True,
    "file": {"driver": "file", "filename": "/a", "locking": "on"},
    "backing": {"driver": "qcow2", "node-name": "below", "file": {"driver": "file", "filename": "/b"}},
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "words": (
        "driver=qcow2,node-name=n,lazy-refcounts=on,l2-cache-size=65536,file.driver=file,file.filename=/a",
        "n",
        {"lazy-refcounts": True, "l2-cache-size": 65536},
    ),
    "the driver alone": ("qcow2,node-name=n,file.driver=file,file.filename=/a", "n", {"driver": "qcow2"}),
    "commas in a name": (
        "driver=qcow2,file.driver=file,file.filename=/a,,b,,,node-name=n,discard=unmap",
        "n",
        {"discard": "unmap"},
    ),
    "JSON": (json.dumps(TREE), "top", {"lazy-refcounts": True}),
    "JSON, beneath": (json.dumps(TREE), "below", {"driver": "qcow2"}),
}


def graph(name: str, file: str = "#block1") -> BlockGraph:
    image = Node(name, "qcow2", read_only=True, file=file)
    return BlockGraph({name: image, file: Node(file, "file", read_only=True, above=(name,))}, frozenset())


@pytest.mark.parametrize("case", CASES)
def test_options_are_found(case: str) -> None:
    word, name, wanted = CASES[case]
    opened = graph(name)
    found = options_of(opened, opened.nodes[name], ["qemu", "-blockdev", word])
    assert found is not None and wanted.items() <= found.items() and "backing" not in found


def test_what_is_on_or_off_or_more_stays_a_word() -> None:
    opened = graph("n")
    word = "qcow2,node-name=n,file.driver=file,file.locking=on,file.filename=/a"
    found = options_of(opened, opened.nodes["n"], ["-blockdev", word])
    assert found is not None and found["file"]["locking"] == "on"


def chain(*names: str) -> BlockGraph:
    """Images that stand on one another, the highest first, whose files are ``/disks/a``, ``/disks/b`` …"""
    nodes: dict[str, Node] = {}
    for number, name in enumerate(names):
        below = names[number + 1] if number + 1 < len(names) else None
        above = names[number - 1 : number] if number else ()
        nodes[name] = Node(name, "qcow2", read_only=number > 0, file=f"f{number}", backing=below, above=tuple(above))
        path = f"/disks/{'abc'[number]}"
        nodes[f"f{number}"] = Node(f"f{number}", "file", read_only=False, path=path, above=(name,))
    return BlockGraph(nodes, frozenset(names[:1]))


DRIVE = "file={},format=qcow2,if=none,id=d,cache=none,aio=native,discard=off,detect-zeroes=on,l2-cache-size=64k"


@pytest.mark.parametrize("name", ["/disks/a", "a", "disks/a"])
def test_options_of_a_drive_and_of_what_it_has_opened_beneath(name: str) -> None:
    opened, words = chain("#block1", "#block2"), ["qemu", "-drive", DRIVE.format(name)]
    top = options_of(opened, opened.nodes["#block1"], words)
    assert top is not None and top["discard"] == "off" and top["l2-cache-size"] == 65536
    assert top["detect-zeroes"] == "on" and top["file"]["aio"] == "native" and "id" not in top
    below = options_of(opened, opened.nodes["#block2"], words)
    assert below is not None and "l2-cache-size" not in below and below["file"]["aio"] == "native"
    for found, wanted in ((top, "sw0-1-2-d0"), (below, "sw0-1-2-e0")):
        # What takes its place says how it was opened.
        anew = opened_anew(found, "/a", "sw0-1-2", None)
        assert anew["file"]["node-name"] == wanted
        taken = graph("sw0-1-2", wanted)
        again = options_of(taken, taken.nodes["sw0-1-2"], words)
        assert again is not None and {**again, "detect-zeroes": ""} == {**found, "detect-zeroes": "", "read-only": True}
    assert options_of(taken, taken.nodes["sw0-1-2"], []) is None


def test_what_nobody_knows_of_a_drive_is_not_guessed() -> None:
    opened = chain("#block1", "#block2")
    strange = ["-drive", f"{DRIVE.format('/disks/a')},throttling.bps-total=1000"]
    assert options_of(opened, opened.nodes["#block1"], strange) is None
    assert options_of(opened, opened.nodes["#block2"], strange) is not None
    # Another file's.
    assert options_of(opened, opened.nodes["#block1"], ["-drive", DRIVE.format("/disks/xa")]) is None
    # Somebody's tip, under an overlay that a snapshot has put on it; and what a header names.
    under = chain("st0-1-2", "#block1", "#block2")
    assert options_of(under, under.nodes["#block1"], []) is None
    assert options_of(under, under.nodes["#block2"], []) is not None


def test_what_took_an_images_place_remembers_how_that_was_opened() -> None:
    words = [
        "-blockdev",
        "file,node-name=f,filename=/a,aio=native",
        "-blockdev",
        "qcow2,node-name=n,file=f,lazy-refcounts=on",
    ]
    opened = graph("n", "f")
    first = options_of(opened, opened.nodes["n"], words)
    assert first is not None
    anew = opened_anew(first, "/a", "sw0-1-2", None)
    taken = graph(anew["node-name"], anew["file"]["node-name"])
    again = options_of(taken, taken.nodes["sw0-1-2"], words)
    assert again == first and again["lazy-refcounts"] and again["file"]["aio"] == "native"
    # One of snaptree's own needs no command line; one of a command line that is gone is not known.
    own = graph("st1-2", "st1-2-file")
    assert options_of(own, own.nodes["st1-2"], []) is not None
    assert options_of(taken, taken.nodes["sw0-1-2"], []) is None
