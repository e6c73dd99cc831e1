"""snaptree, killed just before or after it asks libvirt for something on the way to or from a memory."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from tests.kit import images
from tests.kit.domain import DomainScene
from tests.kit.told import run_killed
from tests.libvirt.test_memory import with_variables

from snaptree.running.guard import PIVOT

pytestmark = pytest.mark.root

ASKED = (
    *("define", "redefine", "forget_record", "cut", "commit", "pull", "pivot", "stop", "start", "stand_still"),
    "go_on",
)
OF_MEMORY = ("save", "park", "restore")


LINES = [
    "snapshot @ m9 --memory",
    "revert @ m1",
    "revert @ m1 --discard",
    "revert @ m1 --discard --delete",
    "revert @ m1 --stopped",
    "revert @ s1 --memory",
    "switch @ parked",
    "delete @ m1",
    "delete @ m1 --memory-only",
    "branch @ other --from m1",
]


def prepared(web: DomainScene) -> dict[str, str]:
    """It runs on ``main``, with a memory snapshot ``m1`` and a branch ``parked`` that has memory; what each shows."""
    web("snapshot @ s1")
    web.write(".1")
    web.virsh("start", "@")
    web("snapshot @ m1 --memory")
    web("revert @ m1 --keep-as parked")
    return {name: web.shows(name) for name in web.names()}


def killed(web: DomainScene, line: str, when: int, *, before: bool) -> bool:
    """Run a command and kill it; whether it came so far."""
    done, _ = run_killed(web, line, when, before=before, calls=ASKED, memory_calls=OF_MEMORY)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def one(web: DomainScene, line: str, when: int, *, before: bool) -> None:
    """One kill, and all that must hold after it."""
    kept = prepared(web)
    if killed(web, line, when, before=before):
        web("recover @")
    web.agree()
    state = web.show()["state"]
    # Where nothing is loaded it is started when all has been done.
    assert state == "running" or line in ("revert @ m1 --stopped", "revert @ s1 --memory")
    for name, named in web.names().items():
        # What was worked on is parked as it was; what is gone back to shows what it did.
        assert web.shows(name) in {kept.get(name, kept["main"]), kept["m1"], kept["s1"]}, name
        assert named["memory"] is None or os.path.exists(named["memory"])
    there = {str(path) for path in web.disks.iterdir() if path.suffix == ".memory"}
    assert there == {named["memory"] for named in web.names().values() if named["memory"]}
    assert not [path for path in web.disks.iterdir() if path.name.startswith(".")]
    # What is left can be gone on with, by both.
    if "m1" in web.names() and web.names()["m1"]["memory"]:
        web("revert @ m1 --discard")
        assert web.show()["state"] == "running"
        web.agree()
        web.virsh("snapshot-revert", "@", "m1")
        web("verify @ --repair")
        web.agree()
    web("gc @")
    web.virsh("destroy", "@") if web.show()["state"] != "off" else None
    web.sound()


@pytest.mark.parametrize(("line", "when"), [("snapshot @ m9 --memory", 1), ("revert @ m1", 1), ("revert @ m1", 2)])
@pytest.mark.parametrize("before", [pytest.param(True, marks=pytest.mark.slow), False], ids=["before", "after"])
def test_killed_between(web: DomainScene, line: str, when: int, before: bool) -> None:
    one(web, line, when, before=before)


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("when", range(1, 9))
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.replace("@ ", "").replace(" ", "-"))
def test_killed_at_everything_that_libvirt_is_asked_for(web: DomainScene, line: str, when: int, before: bool) -> None:
    one(web, line, when, before=before)


@pytest.mark.mutants
@pytest.mark.slow
@pytest.mark.parametrize("line", ["revert @ m1", "revert @ m1 --discard"])
def test_killed_and_started_by_hand(web: DomainScene, line: str) -> None:
    """Somebody starts the domain where a kill has left it off: it is let be, and the memory that was saved goes."""
    kept = prepared(web)
    # It has been turned off, and nothing has been loaded.
    assert killed(web, line, 1, before=False) and web.show()["state"] == "off"
    web.virsh("start", "@")
    number = web.virsh("domid", "@")
    web("recover @")
    assert web.virsh("domid", "@") == number and set(web.names()) == set(kept)
    web.agree()
    assert {name: web.shows(name) for name in kept} == kept
    web.virsh("destroy", "@")
    web.sound()


@pytest.mark.mutants
@pytest.mark.slow
@pytest.mark.parametrize("word", ["", "..w"])
def test_killed_and_started_and_off_again(web: DomainScene, word: str) -> None:
    """It goes on from the memory that was saved if its disks have not been written to since, and is started anew
    otherwise."""
    kept = prepared(web)
    assert killed(web, "revert @ m1", 1, before=False)
    web.virsh("start", "@")
    web.virsh("destroy", "@")
    if word:
        web.write(word)
    assert "was undone" in web("recover @").out
    assert web.show()["state"] == "running" and set(web.names()) == set(kept)
    assert web.shows("main") == ("b1w....." if word else kept["main"])
    web.agree()
    web.virsh("destroy", "@")
    web.sound()


@pytest.mark.mutants
@pytest.mark.slow
@pytest.mark.parametrize("line", ["revert @ m1", "switch @ parked"])
def test_killed_when_it_had_gone_over_and_off_since(web: DomainScene, line: str) -> None:
    """What has died before it wrote anything is loaded again."""
    prepared(web)
    web("switch @ parked")
    web.write("..p")
    web("switch @ main")
    shown = {name: web.shows(name) for name in ("m1", "parked")}
    done, _ = run_killed(web, line, 0, before=True, calls=(), noted=PIVOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    web.virsh("destroy", "@")
    assert "was finished" in web("recover @").out
    assert web.show()["state"] == "running"
    assert web.shows(web.show()["active_branch"]) == shown[line.split()[-1]]
    web.agree()
    web.virsh("destroy", "@")
    web.sound()


@pytest.mark.mutants
@pytest.mark.slow
def test_killed_when_it_had_gone_over_and_written_to_since(web: DomainScene) -> None:
    """What somebody has let write stays as that has left it."""
    kept = prepared(web)
    done, _ = run_killed(web, "revert @ m1", 0, before=True, calls=(), noted=PIVOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    path = web.virsh("domblklist", "@").split()[1]
    web.virsh("destroy", "@")
    images.run("qemu-io", "-f", "qcow2", "-c", "write -P 0x77 131072 65536", path)
    assert "was finished" in web("recover @").out
    assert web.show()["state"] == "off" and web.shows("main") == "b1w....." and web.shows("m1") == kept["m1"]
    web.agree()
    web.sound()


@pytest.mark.slow
def test_killed_when_it_had_gone_over_and_started_by_hand(web: DomainScene) -> None:
    """libvirt has not been told yet, and starts it on the disks of before: there it stays."""
    kept = prepared(web)
    done, _ = run_killed(web, "revert @ m1", 0, before=True, calls=(), noted=PIVOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    web.virsh("destroy", "@")
    web.virsh("start", "@")
    web.write("..z")
    assert "was undone" in web("recover @").out
    assert web.show()["state"] == "running" and set(web.names()) == set(kept)
    assert web.shows("main") == "b1z....." and web.shows("parked") == kept["parked"]
    web.agree()
    web.virsh("destroy", "@")
    web.sound()


def test_a_branch_that_waits_with_its_memory_is_not_written_to(web: DomainScene) -> None:
    """Its memory would go on from disks that it does not know."""
    prepared(web)
    path = web.path("parked")
    images.run("qemu-io", "-f", "qcow2", "-c", "write -P 0x77 131072 65536", path)
    said = web("switch @ parked", status=7)
    assert f"{path} was written to" in said.err and web.show()["active_branch"] == "main"
    assert "main.1" not in web.names() and "written to" in web("verify @", status=10).out
    web("switch @ parked --no-memory")
    assert web.shows("parked") == "b1w....."
    web.agree()
    web.virsh("destroy", "@")
    web.sound()


def test_what_cannot_be_loaded_leaves_the_machine_as_it_was(web: DomainScene) -> None:
    """Only QEMU finds out: the guest of before goes on, from the memory that was saved of it."""
    prepared(web)
    memory = web.names()["m1"]["memory"]
    with open(memory, "r+b") as file:
        content = file.read()
        at = content.index(b"QEVM") + 4
        file.seek(at)
        file.write(b"\xff" * 64)
    web("delete @ --branch parked")
    shutil.rmtree(web.state)
    said = web("revert @ m1", status=12)
    assert "load" in said.err and web.show()["state"] == "running"
    assert set(web.names()) == {"s1", "m1", "main"}
    web.agree()
    assert "started anew" in web("revert @ m1 --discard", status=12).err
    assert web.show()["state"] == "running"
    web.agree()
    web.virsh("destroy", "@")
    web.sound()


@pytest.mark.mutants
@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("when", [1, 2, 3])
def test_killed_while_the_guest_stands_still_for_its_variables(domain: DomainScene, when: int, before: bool) -> None:
    web, _ = domain, with_variables(domain)
    web("snapshot @ s1")
    web.virsh("start", "@")
    assert killed(web, "snapshot @ s9", when, before=before)
    web("recover @")
    assert web.show()["state"] == "running"
    web.agree()
    web("revert @ s9" if "s9" in web.names() else "snapshot @ s9")
    web.virsh("destroy", "@")
    web("gc @")
    web.sound()


def test_whoever_pauses_it_after_a_kill_has_it_paused(domain: DomainScene) -> None:
    """It goes on once: what stands still afterwards somebody else has stopped."""
    web, _ = domain, with_variables(domain)
    web("snapshot @ s1")
    web.virsh("start", "@")
    assert killed(web, "snapshot @ s9", 4, before=True)
    assert web.virsh("domstate", "@").strip() == "running"
    web.virsh("suspend", "@")
    web("recover @")
    assert web.show()["state"] == "paused" and "s9" in web.names()
    web.virsh("destroy", "@")
    web("gc @")
    web.sound()
