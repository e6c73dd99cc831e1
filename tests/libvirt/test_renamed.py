"""A domain that is called otherwise by now, and another one that has its name: what is kept goes with the domain."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from tests.kit.domain import DomainScene, define_text, line
from tests.kit.told import run_killed
from tests.libvirt.test_killed import killed

from snaptree.images.locks import MachineLock

pytestmark = pytest.mark.root
NOT_FOUND, BUSY, REFUSED = 3, 5, 6


@pytest.fixture
def old(web: DomainScene) -> Iterator[str]:
    """What the domain is going to be called; it is removed in the end by its UUID."""
    first = web.uuid
    yield f"{web.name}-old"
    if first in web.virsh("list", "--all", "--uuid").split():
        before, web.name = web.name, first
        web.remove()
        web.name = before


def another(web: DomainScene) -> None:
    """Define another domain of the name, on a disk that shows ``n.......``."""
    second = web.image("second.qcow2", word="n")
    second.chmod(0o600)
    web.uuid = str(uuid.uuid4())
    web.define_xml(define_text(web.name, web.uuid, [("vda", second, "qcow2")]))


def gone(web: DomainScene) -> None:
    """Take the domain away, and leave its images."""
    web.virsh("undefine", "@", "--snapshots-metadata")
    web.left |= set(web.disks.iterdir())


def test_it_goes_on_under_its_new_name(web: DomainScene, old: str) -> None:
    line(web, "s1", "s2")
    web("revert @ s1")
    before, told = web.show(), web("log @").out
    web.virsh("domrename", "@", old)
    assert f"it is called {old} now" in web("snapshot @ s3", status=NOT_FOUND).err
    web.name = old
    shown = web.show()
    assert all(shown[key] == before[key] for key in ("snapshots", "branches", "layers", "active_branch"))
    assert web("log @").out == told
    web("delete @ s1")
    assert len(web("log @").out.splitlines()) > len(told.splitlines())
    assert (web.shows(), web.shows("main.1"), web.shows("s2")) == ("b.......", "b12.....", "b1......")
    web.sound()


def test_memory_of_the_name_that_it_had(web: DomainScene, old: str) -> None:
    """libvirt loads it under no other: that is said while the guest runs."""
    web.be("running")
    web("snapshot @ m1 --memory")
    web.be("off")
    before = web.name
    web.virsh("domrename", "@", old)
    web.name = old
    web.be("running")
    number = web.virsh("domid", "@")
    said = web("revert @ m1 --discard", status=REFUSED)
    assert f"when its name was {before}" in said.err and "--no-memory" in said.err
    assert web.virsh("domid", "@") == number and web.show()["state"] == "running"
    web.be("off")
    web.virsh("domrename", "@", before)
    web.name = before
    web.be("running")
    web("revert @ m1 --discard")
    web.sound()


def test_another_one_has_its_name(web: DomainScene, old: str) -> None:
    line(web, "s1", "s2")
    web("delete @ s1")
    told = web("log @").out
    web.virsh("domrename", "@", old)
    another(web)
    assert web("log @").out == "" and web.show()["snapshots"] == []
    web("snapshot @ s9")
    assert set(web.listed()) == {"s9"} and set(web.names(old)) == {"s2", "main"}
    assert web(f"log {old}").out == told
    web.write("..9")
    web(f"delete {old} s2")
    web("revert @ s9")
    assert web.shows() == "n......." and web.shows("main.1") == "n.9....."
    web.sound(web.name, old)


def test_another_one_that_has_its_name_is_removed(web: DomainScene, old: str) -> None:
    line(web, "s1", "s2")
    web.virsh("domrename", "@", old)
    another(web)
    web("remove @ --delete-files --yes")
    assert web.virsh("list", "--all", "--name").split().count(old) == 1
    assert not (web.disks / "second.qcow2").exists()
    assert (web.shows(machine=old), web.shows("s2", machine=old)) == ("b12.....", "b1......")
    web.sound(old)


@pytest.mark.parametrize("by", ["snapshot @ s9", "recover", "recover @", "recover @-old", "gc @-old"])
def test_it_was_killed_before(web: DomainScene, old: str, by: str) -> None:
    line(web, "s1", "s2")
    assert killed(web, "delete @ s1", 2, before=True)
    web.virsh("domrename", "@", old)
    another(web)
    assert "interrupted" in web.show(old)["pending"][0] and web.show()["pending"] == []
    said = web(by)
    assert not by.startswith("recover") or "it had been killed, and was finished" in said.out
    assert "interrupted" not in str(web.show(old)["pending"]) and web("recover").out == "nothing to recover\n"
    web("snapshot @ s8")
    web(f"gc {old}")
    assert set(web.names(old)) == {"s2", "main"} and "s8" in web.names()
    assert web.shows(machine=old) == "b12....." and web.shows() == "n......."
    web.sound(web.name, old)


def test_it_was_off_for_what_was_killed(web: DomainScene, old: str) -> None:
    line(web, "s1")
    web.be("running")
    run_killed(web, "revert @ s1 --discard", 1, before=False, calls=("stop",))
    web.virsh("domrename", "@", old)
    another(web)
    web("snapshot @ s9")
    assert not web.runs() and not web.runs(old)
    assert "was started again" in web("recover").out and web.runs(old) and not web.runs()
    web.virsh("destroy", old)
    web.sound(web.name, old)


def test_it_is_gone(web: DomainScene) -> None:
    line(web, "s1", "s2")
    assert killed(web, "delete @ s1", 2, before=True)
    gone(web)
    another(web)
    web("snapshot @ s9")
    assert set(web.names()) == {"s9", "main"} and web("recover").out == "nothing to recover\n"
    assert web.shows() == "n......."


def test_what_was_to_be_started_again_is_gone(web: DomainScene) -> None:
    """Another one of its name is off, and stays so."""
    line(web, "s1")
    web.be("running")
    run_killed(web, "revert @ s1 --discard", 1, before=False, calls=("stop",))
    gone(web)
    another(web)
    web("snapshot @ s9")
    assert not web.runs() and web("recover").out == "nothing to recover\n"
    assert not web.runs() and set(web.names()) == {"s9", "main"}


def test_it_gets_the_name_of_one_that_is_gone(web: DomainScene) -> None:
    """Both were worked on; of that one nothing is left but its name."""
    line(web, "s1", "s2")
    gone(web)
    name = web.name
    another(web)
    web.name = f"{name}-new"
    web.virsh("domrename", name, "@")
    web("snapshot @ s9")
    told = web("log @").out
    web.virsh("domrename", "@", name)
    web.name = name
    web("snapshot @ s8")
    assert set(web.names()) == {"s8", "s9", "main"} and told in web("log @").out
    assert web.shows() == "n......." and web("recover").out == "nothing to recover\n"
    web.sound()


def test_what_another_snaptree_works_on_keeps_its_name(web: DomainScene, old: str) -> None:
    line(web, "s1")
    web.virsh("domrename", "@", old)
    another(web)
    before, lock = web.show(old), MachineLock()
    lock.acquire([str(web.path("main", machine=old))])
    try:
        assert "another snaptree" in web("snapshot @ s9", status=BUSY).err
    finally:
        lock.release()
    assert web.show(old) == before and web.show()["snapshots"] == []
    web("snapshot @ s9")
    web.sound(web.name, old)
