"""Every verb on a domain that is off: bytes are right, libvirt's records say so, and virsh goes on from there."""

from __future__ import annotations

import pytest
from tests.kit.domain import DomainScene, line, refused

pytestmark = pytest.mark.root


def test_c10_it_is_never_started_for_it(web: DomainScene) -> None:
    """libvirt writes a log of each QEMU that it starts."""
    log = web.own.log.parent / "log" / "libvirt" / "qemu" / f"{web.name}.log"
    line(web)
    for each in ("delete @ s2", "revert @ s1", "branch @ other --from s3", "switch @ other", "delete @ s1 s3", "gc @"):
        web(each)
    web("delete @ --branch main.1")
    web.sound()
    assert not log.exists()
    web.be("running")
    assert "starting up libvirt" in log.read_text()


def test_snapshots_are_virshs_too(web: DomainScene) -> None:
    line(web)
    assert web.listed() == {"s1": None, "s2": "s1", "s3": "s2"} and web.current() == "s3"
    assert [web.shows(each) for each in ("s1", "s2", "s3", "main")] == [
        "b.......", "b1......", "b12.....", "b123....",
    ]  # fmt: skip
    web.sound()
    web.virsh("snapshot-create-as", "@", "s4", "--disk-only")
    web.write("....4")
    assert web.names()["s4"]["parent"] == "s3" and web.shows("s4") == "b123...."
    web.virsh("snapshot-revert", "@", "s2")
    assert web.virsh_shows() == "b1......"
    assert web.names()["main"]["parent"] == "s2"
    web.virsh("snapshot-delete", "@", "s4")
    assert set(web.listed()) == {"s1", "s2", "s3"}
    assert [web.shows(each) for each in ("s1", "s2", "s3")] == ["b.......", "b1......", "b12....."]
    web("snapshot @ s5")
    web.sound()


def test_delete_in_the_middle_at_the_end_and_at_the_root(web: DomainScene) -> None:
    line(web)
    web("delete @ s2")
    assert web.listed() == {"s1": None, "s3": "s1"}
    web.sound()
    assert [web.shows(each) for each in ("s1", "s3", "main")] == ["b.......", "b12.....", "b123...."]
    web("delete @ s1")
    web.sound()
    web("delete @ s3")
    assert web.listed() == {} and web.shows() == "b123...."
    assert web.files() == {"web.qcow2"} and web.source()[0].name == "web.qcow2"
    web.sound()


def test_going_back_keeps_the_work_and_virsh_can_too(web: DomainScene) -> None:
    line(web)
    web("revert @ s1")
    assert web.shows() == "b......." and web.shows("main.1") == "b123...."
    assert web.listed() == {"s1": None, "s2": "s1", "s3": "s2", "main.1": "s3"} and web.current() == "s1"
    web.sound()
    web.write(".......x")
    web("switch @ main.1")
    assert web.virsh_shows() == "b123...." and web.shows("main") == "b......x"
    web.sound()
    # virsh goes back to what is parked as to any snapshot; the work of before is gone then, as always with it.
    web.virsh("snapshot-revert", "@", "main")
    assert web.virsh_shows() == "b......x"
    assert [web.shows(each) for each in ("s1", "s2", "s3")] == ["b.......", "b1......", "b12....."]
    web("snapshot @ again")
    web.sound()


def test_discard_and_delete(web: DomainScene) -> None:
    line(web)
    web("revert @ s3 --discard --delete")
    assert web.shows() == "b12....." and web.listed() == {"s1": None, "s2": "s1"} and web.current() == "s2"
    web.sound()
    web("revert @ s1 --discard --delete --children")
    assert web.shows() == "b......." and web.listed() == {} and web.files() == {"web.qcow2"}
    web.sound()


def test_a_fork_that_virsh_does_not_delete(web: DomainScene) -> None:
    web("snapshot @ s1")
    web.write(".1")
    web("snapshot @ s2")
    web.write("..2")
    web("branch @ other --from s1 --switch")
    web.write(".......o")
    web("snapshot @ o1")
    assert "multiple children" in refused(web, "snapshot-delete", "@", "s1")
    web("delete @ s1")
    assert web.listed()["s2"] is None and web.listed()["o1"] is None
    web.sound()
    assert [web.shows(each) for each in ("s2", "main", "o1", "other")] == [
        "b1......", "b12.....", "b......o", "b......o",
    ]  # fmt: skip
    web("delete @ o1")
    web.sound()
    assert web.current() == "snaptree-placeholder"
    # virsh does no harm to the layer that both stand on, which is nobody's.
    assert refused(web, "snapshot-delete", "@", "snaptree-placeholder")
    web.virsh("snapshot-revert", "@", "s2")
    assert web.virsh_shows() == "b1......" and web.shows("s2") == "b1......" and web.shows("main") == "b12....."
    web("snapshot @ s9")
    web.sound()


def test_rename_and_branches(web: DomainScene) -> None:
    line(web)
    web("branch @ side --from s2")
    web("rename @ s2 second")
    web("rename @ side aside")
    assert web.listed() == {"s1": None, "second": "s1", "s3": "second", "aside": "second"}
    web.sound()
    web("rename @ main trunk")
    assert web.show()["active_branch"] == "trunk"
    web("delete @ --branch aside")
    assert web.listed() == {"s1": None, "second": "s1", "s3": "second"}
    web.sound()
