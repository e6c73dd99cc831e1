"""Ten processes at one machine, and at machines that share a base: each waits or is refused, and all stays right."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
from pathlib import Path

import pytest
from tests.crash.cases import CASES
from tests.kit import images
from tests.kit.scene import TOOL, Scene
from tests.kit.world import World, request_done

from snaptree.errors import BusyError
from snaptree.planning.verbs import GcRequest

GOOD = {0, 3, 4, 5, 6, 13}
"""Done, or refused clearly: somebody else was first."""


def words(scene: Scene, machine: str = "web1") -> dict[str, str]:
    """What each snapshot and each branch shows."""
    return {name: scene.shows(name, machine=machine) for name in scene.names(machine)}


def at_once(scene: Scene, lines: list[list[str]]) -> list[int]:
    place = {**os.environ, "SNAPTREE_STATE": str(scene.state)}
    running = [
        subprocess.Popen([*TOOL, *line], env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for line in lines
    ]
    statuses = []
    for line, process in zip(lines, running, strict=True):
        _, err = process.communicate(timeout=120)
        assert process.returncode in GOOD, f"{line}: {process.returncode} {err.decode()}"
        assert b"Traceback" not in err and b"unforeseen" not in err, err
        statuses.append(process.returncode)
    return statuses


def test_ten_verbs_on_one_machine(web1: Scene) -> None:
    chance = random.Random(1)
    for number in range(3):
        web1(f"snapshot web1 s{number}")
        web1.write("." * (number + 1) + str(number))
    for turn in range(3):
        lines = [
            ["snapshot", "web1", f"a{turn}", "--wait", "60"],
            ["snapshot", "web1", f"b{turn}"],
            ["snapshot", "web1", f"i{turn}", "--internal", "--wait", "60"],
            ["delete", "web1", f"s{turn}", "--wait", "60"],
            ["delete", "web1", f"s{turn}"],
            ["branch", "web1", f"c{turn}", "--wait", "60"],
            ["revert", "web1", "s2", "--wait", "60"],
            ["gc", "web1", "--wait", "60"],
            ["verify", "web1"],
            ["rename", "web1", "main", f"main{turn}"],
        ]
        chance.shuffle(lines)
        before = words(web1)
        statuses = at_once(web1, lines)
        assert statuses.count(0) >= 4
        assert web1("tree web1").out
        active = next(each["name"] for each in web1.show()["branches"] if each["active"])
        if active != "main":
            web1(f"rename web1 {active} main")
        for name, word in words(web1).items():
            # No guest has written: what is new is as the branch was, or as what it went back to.
            assert word in ([before[name]] if name in before and name != "main" else [before["main"], before["s2"]])
    web1("gc web1")
    web1.sound()


def test_machines_that_share_a_base(scene: Scene) -> None:
    golden = scene.image("golden.qcow2", word="golden")
    before = golden.read_bytes()
    machines = [f"web{number}" for number in range(5)]
    for machine in machines:
        scene.image(f"{machine}.qcow2", backing="golden.qcow2")
    at_once(scene, [["add", machine, "--disk", f"vda={scene.disks / machine}.qcow2"] for machine in machines])
    assert [each["machine"] for each in scene("list --json").json] == machines
    for verb in (
        ["snapshot", "{}", "s1"],
        ["branch", "{}", "b1", "--from", "s1"],
        ["delete", "{}", "s1", "--with-branches"],
    ):
        statuses = at_once(scene, [[word.format(machine) for word in verb] for machine in machines])
        assert statuses == [0] * 5
    for machine in machines:
        assert scene.shows(machine=machine) == "golden.."
    assert golden.read_bytes() == before
    scene.sound(*machines)


def test_ten_verbs_on_machines_that_share_a_base(scene: Scene) -> None:
    """One of them owns what the others stand on: it is the one that may write to it, and does not."""
    scene.image("web0.qcow2", word="base")
    scene("add web0 --disk vda=web0.qcow2")
    scene("snapshot web0 s1")
    scene.write("....0", machine="web0")
    golden = scene.disks / "web0.qcow2"
    before = golden.read_bytes()
    machines = [f"web{number}" for number in range(5)]
    for number, machine in enumerate(machines[1:], 1):
        scene.image(f"{machine}.qcow2", backing="web0.qcow2")
        scene(f"add {machine} --disk vda={machine}.qcow2")
        for name in ("s1", "s2"):
            scene(f"snapshot {machine} {name}")
            scene.write("." * (3 + int(name[1])) + str(number), machine=machine)
    known = {machine: words(scene, machine) for machine in machines}
    lines = [
        "delete web0 s1 --merge commit", "gc web0", "delete web1 s1 --merge commit", "snapshot web1 new",
        "delete web2 s2 --merge pull", "branch web2 new --from s1", "revert web3 s1", "snapshot web3 new --internal",
        "delete web4 s1 s2", "squash web4 --disk vda",
    ]  # fmt: skip
    statuses = at_once(scene, [f"{line} --wait 60".split() for line in lines])
    assert statuses[:8] == [0] * 8
    for machine in machines:
        for name, word in words(scene, machine).items():
            # That of the third goes back, before it is taken or afterwards.
            went = (known[machine]["main"], known[machine]["s1"])
            assert word == known[machine].get(name) or ((machine == "web3" or name == "new") and word in went)
    assert golden.read_bytes() == before
    scene.sound(*machines)


@pytest.mark.parametrize(
    "case",
    [
        "snapshot", "internal snapshot", "delete s1 of a line by commit", "delete s3 of a line by commit",
        "delete s2 of a line by pull", "revert", "revert, discard", "revert within the tip", "switch",
        "delete over layers of several sizes by auto", "branch from here",
    ],
)  # fmt: skip
def test_qemu_starts_on_the_tip_in_the_middle(case: str, tmp_path: Path) -> None:
    """It cannot, or what its guest writes is kept where it was written."""
    world = World(tmp_path)
    CASES[case].build(world)
    request, before = CASES[case].request(world), world.tree
    refused, written, numbers = 0, dict[str, int](), itertools.count(100)

    def start(_: object) -> None:
        nonlocal refused
        for disk in world.tree.disks:
            (path, form), number = world.tip(disk), next(numbers)
            words = ["qemu-io", "-f", form, "-c", f"write -q -P {number} 4k 512", str(path)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode != 0 or done.stdout:
                assert "lock" in done.stderr, done
                refused += 1
            elif request_done(before, world.tree, request):
                written[disk] = number
            else:
                world.reread(disk)

    try:
        world.machine.run(request, progress=start)
    except BusyError:
        world.machine.run(GcRequest())
    assert refused > 0
    assert world.settle(request, before)
    here = world.truth[world.active]
    for disk, number in written.items():
        here[disk] = here[disk][:4096] + bytes([number]) * 512 + here[disk][4608:]
    world.check()


def test_qemu_cannot_open_a_tip_while_it_is_merged(scene: Scene, tmp_path: Path) -> None:
    path = images.create(scene.disks / "web1.qcow2", 512 << 20)
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    images.io(scene.path("main"), "qcow2", "write -P 2 0 200M")
    place = {**os.environ, "SNAPTREE_STATE": str(scene.state)}
    process = subprocess.Popen([*TOOL, "delete", "web1", "s1", "--merge", "commit", "--limit", "100MiB/s"], env=place)
    opened = refused = 0
    while process.poll() is None:
        if "half-merged" in scene("show web1").out:
            done = subprocess.run(["qemu-io", "-c", "length", path], capture_output=True, check=False)
            refused += done.returncode != 0
            # When the merge has come to its end meanwhile it may be opened again.
            opened += done.returncode == 0 and "half-merged" in scene("show web1").out
    assert process.returncode == 0
    assert refused > 0 and opened == 0
    images.io(path, "qcow2", "read -q -P 2 0 200M")
    scene.sound()
