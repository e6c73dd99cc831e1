"""Hostile images cost bounded time and memory, end in a clear error or none, and open nothing that the gate forbids.

``SNAPTREE_HOSTILE`` says how many images are tried in this process; a twentieth of them also through the command line.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

from tests.images import hostile
from tests.kit.scene import command

from snaptree.errors import SnaptreeError
from snaptree.images import gate
from snaptree.images.facts import read_facts
from snaptree.images.measure import measure_row

MEMORY = 512 << 20
OPENED: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and WATCHING and isinstance(arguments[0], str | bytes):
        OPENED.append(os.fsdecode(arguments[0]))


WATCHING = False
sys.addaudithook(watch)


def test_hostile_images_are_harmless(tmp_path: Path) -> None:
    global WATCHING
    count, seed = int(os.environ.get("SNAPTREE_HOSTILE", "2000")), int(os.environ.get("SNAPTREE_SEED", "0") or "0") or 1
    chance = random.Random(seed)
    folder = tmp_path / "disks"
    folder.mkdir()
    sound = hostile.sound_images(folder)
    hostile.surroundings(folder, sound[0])
    path = folder / "hostile.qcow2"
    slowest, good = 0.0, 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    for number in range(count):
        path.write_bytes(hostile.make(chance.choice(sound), chance))
        before = sorted(each.name for each in folder.iterdir())
        content = path.read_bytes()
        began = time.monotonic()
        OPENED.clear()
        WATCHING = True
        try:
            links = gate.read_chain(str(path), None)
            row = [(link.path, link.facts.format) for link in reversed(links)]
            measure_row(row if len(row) > 1 else row * 2)
            gate.find_overlays([str(folder)], set())
            good += 1
        except SnaptreeError as error:
            assert error.message
        finally:
            WATCHING = False
        read_facts(str(path), "qcow2")
        seconds = time.monotonic() - began
        slowest = max(slowest, seconds)
        assert seconds < 5, f"seed {seed}, image {number} took {seconds:.1f} s"
        outside = [each for each in OPENED if os.path.dirname(each) != str(folder) and each != str(folder)]
        assert [each for each in outside if not each.endswith((".py", ".pyc", ".so"))] == [], (
            f"seed {seed}, image {number}"
        )
        assert path.read_bytes() == content and sorted(each.name for each in folder.iterdir()) == before
        if number % 20 == 0:
            said = command("add", "web1", "--disk", f"vda={path}", "--plan", state=tmp_path / "state")
            assert said.status in (0, 2, 3, 6, 7, 9), f"seed {seed}, image {number}: {said}"
            assert "unforeseen" not in said.err and "Traceback" not in said.err, f"seed {seed}, image {number}: {said}"
    print(f"{count} images, {good} of them sound all the same, the slowest took {slowest:.2f} s")
    assert 0 < good < count
    # What other tests have taken before is not theirs.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 < max(memory + 1, MEMORY)
