"""snaptree and QEMU killed in a merge by shared blocks, and QEMU started again by hand before anything is recovered."""

from __future__ import annotations

import json

import pytest
from tests.kit import guest
from tests.kit.scene import command
from tests.kit.stage import Stage, killed_at
from tests.live.test_delete_killed import started_again
from tests.live.test_delete_shared import files_open, loosen


def started_by_hand(stage: Stage, how: str) -> None:
    """QEMU on the tips, on the chain that the tree says or on the one that the headers say."""
    last = min(stage.holds("main", killed=True))
    layers = {each["path"]: each for each in stage.show()["layers"]}
    words = stage.boot.words(stage.folder)
    for disk in guest.DISKS:
        chain = [stage.names()["main"]["tips"][disk]["path"]]
        while how == "tree" and layers[chain[-1]]["parent"] is not None:
            chain.append(layers[chain[-1]]["parent"])
        for number, path in reversed(list(enumerate(chain))):
            options = {"driver": "qcow2", "node-name": f"n-{disk}-{number}", "read-only": number > 0}
            options |= {"file": {"driver": "file", "filename": path, "locking": "on"}}
            if how == "tree":
                options["backing"] = f"n-{disk}-{number + 1}" if number + 1 < len(chain) else None
            words += ["-blockdev", json.dumps(options)]
        words += ["-device", guest.device(disk, f"n-{disk}-0")]
    stage.guest = guest.launch([*words, "-qmp", f"unix:{stage.monitor},server=on,wait=off"], stage.folder)
    stage.guest.go(at=last)


def recovered(stage: Stage, held: dict[str, tuple[int, ...]]) -> None:
    stage.guest.writes_on(5)
    assert {name: stage.holds(name) for name in held} == held
    said = command("recover", "web1", state=stage.state, folder=stage.disks)
    stage.guest.writes_on(5)
    assert {name: stage.holds(name) for name in held} == held
    if said.status:
        # One file was in place and another not, and this QEMU's nodes are not such as can be reopened.
        assert "cannot be found out" in said.err and "shut down" in said.err, said.err
        stage.kill_qemu()
        stage("recover web1")
        started_by_hand(stage, "tree")
    assert files_open(stage) == {each["path"] for each in stage.show()["layers"]}
    stage.sound()


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("how", "begin", "stride"),
    [
        ("headers", 110, 60),
        pytest.param("tree", 90, 70, marks=SLOW),
        *(pytest.param(how, 1, 2, marks=SLOW) for how in ("headers", "tree")),
    ],
)
def test_qemu_is_started_by_hand_before_recovery(sharing: Stage, how: str, begin: int, stride: int) -> None:
    stage = sharing
    stage.start(raw=False)
    held, when, done = loosen(stage, 0), begin, 0
    while killed_at(stage, when, "gc web1"):
        stage.guest.writes_on(3)
        stage.kill_qemu()
        started_by_hand(stage, how)
        recovered(stage, held)
        if not any("waits" in each for each in stage.show()["pending"]):
            done += 1
            stage(f"delete web1 {' '.join(held)}")
            stage.guest.writes_on(3)
            held = loosen(stage, when)
        when += stride
    assert done >= 1 and when > 40
    stage.guest.writes_on()
    stage.finish()


def test_qemu_dies_and_stays_dead(sharing: Stage) -> None:
    """Then the files are believed, and the machine starts on what is kept."""
    stage = sharing
    stage.start(raw=False)
    held, when = loosen(stage, 0), 35
    while killed_at(stage, when, "gc web1"):
        stage.guest.writes_on(3)
        started_again(stage)
        assert {name: stage.holds(name) for name in held} == held
        stage("gc web1")
        stage(f"delete web1 {' '.join(held)}")
        held = loosen(stage, when)
        when += 70
    assert when > 40
    stage.finish()
