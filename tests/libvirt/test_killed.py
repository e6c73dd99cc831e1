"""snaptree, killed just before or after it tells libvirt something: nothing is lost, and recovery tells the rest."""

from __future__ import annotations

import signal

import pytest
from tests.kit.domain import DomainScene, line
from tests.kit.told import run_killed

pytestmark = pytest.mark.root

TOLD = ("define", "redefine", "forget_record", "undefine", "cut", "commit", "pull", "pivot", "stand_still", "go_on")


VERBS = {
    "snapshot @ s9": "a name",
    "delete @ s2": "the middle",
    "delete @ s1 s2": "the root and more",
    "revert @ s1": "parking",
    "revert @ s3 --discard --delete": "dropping",
    "branch @ grown --from s1": "a branch",
    "switch @ other": "switching",
    "rename @ s2 second": "another name",
    "delete @ --branch other": "a branch less",
}


def prepared(web: DomainScene) -> dict[str, str]:
    """``s1``, ``s2``, ``s3`` in a row and a branch ``other`` that grew from ``s2``; what each shows."""
    for number in range(1, 4):
        web(f"snapshot @ s{number}")
        web.write("." * number + str(number))
    web("branch @ other --from s2")
    return {name: web.shows(name) for name in web.names()}


def killed(web: DomainScene, line: str, when: int, *, before: bool) -> bool:
    """Run a command and kill it; whether it came so far."""
    done, _ = run_killed(web, line, when, before=before, calls=TOLD)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def is_whole(web: DomainScene, before: dict[str, str]) -> None:
    """All that has a name shows what it did; what was parked shows what was worked on."""
    for name in web.names():
        shown = web.shows(name)
        assert shown in ({before[name], *before.values()} if name == "main" else {before.get(name, before["main"])} | (
            {before["s2"]} if name == "second" else {before["s1"]} if name == "grown" else set()
        )), (name, shown)  # fmt: skip


def one(web: DomainScene, line: str, when: int, *, before: bool) -> bool:
    """One kill, and all that must hold after it."""
    shown = prepared(web)
    if not killed(web, line, when, before=before):
        web.sound()
        return False
    is_whole(web, shown)
    assert web("show @ --json").json["pending"]
    web("recover @")
    web.sound()
    is_whole(web, shown)
    web("snapshot @ afterwards")
    web.virsh("snapshot-revert", "@", "s3" if "s3" in web.names() else "afterwards")
    return True


@pytest.mark.parametrize(("line", "when"), [("delete @ s1 s2", 2), ("revert @ s1", 1)])
def test_killed_between(web: DomainScene, line: str, when: int) -> None:
    assert one(web, line, when, before=when % 2 == 0)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("call", ["stand_still", "go_on"])
def test_killed_while_it_stands_still_for_a_moment(web: DomainScene, call: str, before: bool) -> None:
    """So that QEMU brings to disk what it has merged. It goes on afterwards."""
    shown = prepared(web)
    web.be("running")
    done, told = run_killed(web, "delete @ s3 --merge pull", 1, before=before, calls=(call,))
    assert told and done.returncode == -signal.SIGKILL
    web("recover @")
    assert web.show()["state"] == "running"
    web("gc @")
    assert web.show()["state"] == "running"
    web.be("off")
    is_whole(web, shown)
    web.sound()


@pytest.mark.mutants
@pytest.mark.slow
def test_started_on_the_old_disk_after_a_kill(web: DomainScene) -> None:
    """What the guest writes to a file whose data has gone down already goes down as well."""
    web("snapshot @ s1")
    web.write(".1")
    before = web.source()[0]
    # The name goes (the definition, the record), then the merged disk is to be told.
    assert killed(web, "delete @ s1 --merge commit", 3, before=True)
    assert web.source()[0] == before and before.name != "web.qcow2"
    web.write("..w")
    web("recover @")
    assert web.shows() == "b1w....." and web.source()[0].name == "web.qcow2"
    web.sound()


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("when", range(1, 7))
@pytest.mark.parametrize("line", VERBS, ids=lambda line: line.replace("@ ", "").replace(" ", "-"))
def test_killed_at_everything_that_libvirt_is_told(web: DomainScene, line: str, when: int, before: bool) -> None:
    one(web, line, when, before=before)


@pytest.mark.parametrize("by", ["recover @", "recover", "snapshot @ s9"])
@pytest.mark.parametrize(
    ("call", "state", "shows"),
    [("stop", "running", "b1......"), ("start", "running", "b......."), ("stop", "paused", "b1......")],
)
def test_killed_while_it_is_off_for_it(web: DomainScene, call: str, state: str, shows: str, by: str) -> None:
    line(web, "s1")
    web.be("running")
    if state == "paused":
        web.virsh("suspend", "@")
    _, told = run_killed(web, "revert @ s1 --discard", 1, before=call == "start", calls=(call,))
    assert told and not web.runs()
    assert f"is to be {state} again" in web.show()["pending"][-1]
    said = web(by)
    assert by.startswith("snapshot") or "was started again" in said.out
    assert web.show()["state"] == state and web.show()["pending"] == [] and web.shows() == shows
    assert web("recover @").out == "nothing to recover\n"
    web.be("off")
    assert web("recover").out == "nothing to recover\n"
    web.sound()


def test_killed_while_it_is_off_after_its_memory_was_saved(web: DomainScene) -> None:
    line(web, "s1")
    web.be("running")
    _, told = run_killed(web, "revert @ s1 --memory", 1, before=True, calls=("start",))
    assert told and not web.runs()
    assert "was started again" in web("recover @").out
    assert web.runs() and web.shows() == "b......." and web.names()["main.1"]["memory"]
    web.be("off")
    web.sound()


def test_killed_while_it_is_off_for_it_and_somebody_has_started_it_since(web: DomainScene) -> None:
    line(web, "s1")
    web.be("running")
    run_killed(web, "revert @ s1 --discard", 1, before=False, calls=("stop",))
    web.be("running")
    assert web.show()["pending"] == [] and web("recover @").out == "nothing to recover\n"
    web.be("off")
    assert web("recover @").out == "nothing to recover\n" and not web.runs()
    web.sound()


@pytest.mark.mutants
@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("when", range(1, 8))
@pytest.mark.parametrize("line", ["snapshot @ s9", "delete @ s2", "delete @ s3", "delete @ s1 s2 s3"])
def test_killed_at_everything_that_libvirt_is_told_while_it_runs(
    web: DomainScene, line: str, when: int, before: bool
) -> None:
    shown = prepared(web)
    web.virsh("start", "@")
    if killed(web, line, when, before=before):
        web("recover @")
        web("gc @")
    web.agree()
    web.virsh("destroy", "@")
    web.sound()
    is_whole(web, {"s9": shown["main"], **shown})
    assert web.shows() == shown["main"]
