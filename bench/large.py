#!/usr/bin/env python3
"""Large trees and large images: planning, drawing, start-up, and the memory that a survey takes."""

from __future__ import annotations

import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from snaptree.model.branch import Branch
from snaptree.model.delta import diff
from snaptree.model.layer import Identity, Layer, Point
from snaptree.model.machine import MachineConfig
from snaptree.model.snapshot import Snapshot
from snaptree.model.survey import LayerFacts, RowFacts, Survey
from snaptree.model.tree import Tree
from snaptree.planning.adopt import empty
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.revert import RevertRequest
from snaptree.planning.unmeasured import Unmeasured
from snaptree.planning.verbs import Request, plan
from snaptree.store import trees
from snaptree.store.database import Database

MIB = 1 << 20


def median(work: Callable[[], object], runs: int = 5) -> float:
    """The median of some runs, in seconds."""
    times = []
    for _ in range(runs):
        began = time.monotonic()
        work()
        times.append(time.monotonic() - began)
    return statistics.median(times)


def forest(count: int, folder: str) -> Tree:
    """A tree of so many snapshots: a hundred lines that fork from one root, none deeper than the limit."""
    layers = {1: Layer(1, "vda", f"{folder}/web1.qcow2", "qcow2", None, True, MIB, Identity(1, 1, 0, 0))}
    snapshots = {"root": Snapshot("root", None, {"vda": Point(1)}, 0.0)}
    branches: dict[str, Branch] = {}
    deep, number = 99, 1
    while number < count:
        parent, below = "root", 1
        for _ in range(min(deep, count - number)):
            number += 1
            layers[number] = Layer(
                number, "vda", f"{folder}/web1.{number}.qcow2", "qcow2", below, True, MIB, Identity(1, number, 0, 0)
            )
            snapshots[f"s{number}"] = Snapshot(f"s{number}", parent, {"vda": Point(number)}, float(number))
            parent, below = f"s{number}", number
        tip = 10 * count + len(branches)
        layers[tip] = Layer(tip, "vda", f"{folder}/web1.tip{tip}.qcow2", "qcow2", below, True, MIB)
        name = "main" if not branches else f"b{tip}"
        branches[name] = Branch(name, parent, {"vda": Point(tip)}, float(number))
    return Tree("web1", "main", layers, snapshots, branches, {}, {"vda": (layers[1].path, "qcow2")})


def survey_of(tree: Tree) -> Survey:
    """What would be read of sound files."""
    facts = {
        layer.id: LayerFacts(
            layer.path,
            identity=Identity(1, layer.id, 0, 0),
            virtual_size=MIB,
            allocated=MIB,
            backing=tree.layers[layer.parent].path if layer.parent else None,
        )
        for layer in tree.layers.values()
    }
    names = {os.path.dirname(layer.path): frozenset[str]() for layer in list(tree.layers.values())[:1]}
    return Survey(layers=facts, names=names, now=1.0)


def planned(tree: Tree, survey: Survey, request: Request) -> None:
    """Plan as a machine does: what has to be measured is measured and asked again."""
    try:
        plan(tree, survey, request)
    except Unmeasured as wanted:
        rows = {row: RowFacts(1, 0, 1, 1, 1) for row in wanted.rows}
        plan(tree, replace(survey, rows=rows), request)


def measure_planning() -> None:
    """Planning for 10,000 snapshots, from a tree as it was just read."""
    tree = forest(10_000, "/images")
    survey = survey_of(tree)
    middle = "s5000"
    requests: tuple[tuple[str, Request], ...] = (
        ("snapshot", SnapshotRequest("new")),
        ("delete one", DeleteRequest((middle,))),
        ("delete a hundred", DeleteRequest(tuple(f"s{number}" for number in range(4000, 4100)))),
        ("delete all", DeleteRequest(("root",), children=True)),
        ("revert", RevertRequest(middle)),
    )
    for what, request in requests:
        seconds = median(partial(plan_anew, tree, survey, request), 3)
        print(f"plan to {what} in a tree of 10,000: {seconds:.3f} s")


def plan_anew(tree: Tree, survey: Survey, request: Request) -> None:
    """Plan with a tree that has worked nothing out yet, as one that was just read."""
    planned(Tree(**fields(tree)), survey, request)


def fields(tree: Tree) -> dict[str, Any]:
    """What a tree is made of, without what it has worked out already."""
    return {
        name: getattr(tree, name)
        for name in ("machine", "active", "layers", "snapshots", "branches", "memories", "roots")
    }


def measure_commands(folder: Path) -> None:
    """``tree`` and ``show`` of a machine with 1,000 snapshots whose files are there, and start-up."""
    disks = folder / "disks"
    disks.mkdir()
    tree = forest(1000, str(disks))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disks / "web1.qcow2", str(MIB)], check=True)
    from snaptree.images.facts import read_facts
    from snaptree.images.layout import empty_overlay

    made: dict[int, Layer] = {}
    for layer in tree.layers.values():
        if layer.parent is not None:
            name = os.path.basename(tree.layers[layer.parent].path)
            writes, length = empty_overlay(MIB, cluster_bits=16, backing_name=name, backing_format="qcow2")
            with open(layer.path, "wb") as file:
                file.truncate(length)
                for offset, data in writes:
                    file.seek(offset)
                    file.write(data)
        made[layer.id] = layer
    tips = {point.layer for branch in tree.branches.values() for point in branch.tips.values()}
    frozen = [layer for layer in made.values() if layer.id not in tips]
    database = Database(str(folder / "state"))
    with database.transaction() as connection:
        trees.register(connection, MachineConfig("web1"), new=True)
        trees.apply_delta(connection, "web1", diff(empty("web1"), tree))
        for layer in frozen:
            identity = read_facts(layer.path, "qcow2").identity
            assert identity is not None
            trees.put_identity(connection, "web1", layer.id, identity)
    database.close()
    small = {**os.environ, "SNAPTREE_STATE": str(folder / "small")}
    tool = str(Path(sys.executable).parent / "snaptree")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "small.qcow2", str(MIB)], check=True)
    for words in (["add", "web1", "--disk", str(folder / "small.qcow2")], ["snapshot", "web1", "s1"]):
        subprocess.run([tool, *words], env=small, check=True, capture_output=True)
    large = {**os.environ, "SNAPTREE_STATE": str(folder / "state")}
    for what, env, words in (
        ("snaptree --version", small, ["--version"]),
        ("tree of a small machine", small, ["tree", "web1"]),
        ("tree of 1,000 snapshots", large, ["tree", "web1"]),
        ("show of 1,000 snapshots", large, ["show", "web1"]),
        ("show --json of 1,000", large, ["show", "web1", "--json"]),
    ):
        line = [tool, *words]
        seconds = median(partial(subprocess.run, line, env=env, check=True, capture_output=True))
        print(f"{what}: {seconds:.3f} s")


def measure_survey(folder: Path, size: int = 10 << 40) -> None:
    """Peak memory for measuring an image of 10 TiB that is fully allocated; only its tables are written."""
    path, cluster = folder / "huge.qcow2", 65536
    base = folder / "base.qcow2"
    per_table = cluster // 8
    tables = -(-size // (per_table * cluster))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, str(size)], check=True)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", path, str(size)], check=True
    )
    with path.open("r+b") as file:
        head = file.read(cluster)
        l1 = struct.unpack_from(">Q", head, 40)[0]
        first = (l1 + tables * 8 + cluster - 1) // cluster * cluster
        data = first + tables * cluster
        file.truncate(data + size)
        file.seek(l1)
        file.write(b"".join(struct.pack(">Q", (first + n * cluster) | 1 << 63) for n in range(tables)))
        import numpy as np

        for number in range(tables):
            file.seek(first + number * cluster)
            at = data + (np.arange(per_table, dtype=np.uint64) + np.uint64(number * per_table)) * np.uint64(cluster)
            file.write((at | np.uint64(1 << 63)).astype(">u8").tobytes())
    script = (
        "import re; from snaptree.images.facts import read_facts;"
        "from snaptree.images.mover.cost import foreseen as measure_row;"
        f"read_facts({str(path)!r}, 'qcow2');"
        f"row = measure_row([({str(base)!r}, 'qcow2'), ({str(path)!r}, 'qcow2')]);"
        "print(row.commit_bytes, re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    began = time.monotonic()
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert int(said[0]) == size, said
    print(f"survey of 10 TiB, fully allocated: {int(said[1]) / 1024:.0f} MiB at most, {time.monotonic() - began:.1f} s")


def main() -> None:
    """Measure and print."""
    folder = Path(tempfile.mkdtemp(prefix="snaptree-bench-"))
    try:
        measure_planning()
        measure_commands(folder)
        measure_survey(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
