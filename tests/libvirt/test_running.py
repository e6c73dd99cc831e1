"""A domain that runs: its disks are frozen and their layers merged by libvirt, and virsh goes on from there."""

from __future__ import annotations

import pytest
from tests.kit import images
from tests.kit.domain import DomainScene, refused
from tests.kit.scene import word_of

pytestmark = pytest.mark.root
REFUSED = 6


def line(web: DomainScene) -> None:
    """``s1``, ``s2`` and ``s3`` in a row, each with a slot of its own."""
    for number in range(1, 4):
        web(f"snapshot @ s{number}")
        web.write("." * number + str(number))


def shown(web: DomainScene, name: str) -> str:
    """What a name shows while a QEMU has its files open."""
    layers = {each["path"]: each for each in web.show()["layers"]}
    named = web.names()[name]
    point = (named.get("points") or named.get("tips"))["vda"]
    at, chain = point["path"], []
    while at is not None:
        chain.append((at, layers[at]["format"]))
        at = layers[at]["parent"]
    return word_of(images.read_unlocked(chain))


def test_snapshots_and_deletions_while_it_runs(web: DomainScene) -> None:
    line(web)
    web.virsh("start", "@")
    web("snapshot @ s4")
    assert web.listed() == {"s1": None, "s2": "s1", "s3": "s2", "s4": "s3"} and web.current() == "s4"
    assert web.names()["s4"]["consistency"] == "crash" and web.show()["state"] == "running"
    web.agree()
    # In the middle, at the root, at the tip; and several at once.
    web("delete @ s2")
    web.agree()
    web("delete @ s4")
    web.agree()
    web("delete @ s1")
    web.agree()
    assert web.listed() == {"s3": None} and shown(web, "s3") == "b12....." and shown(web, "main") == "b123...."
    web("delete @ s3")
    web.agree()
    assert web.listed() == {} and web.files() == {"web.qcow2"} and shown(web, "main") == "b123...."
    web.virsh("snapshot-create-as", "@", "by-virsh", "--disk-only")
    web.virsh("destroy", "@")
    web("verify @ --repair")
    web.sound()
    assert web.shows() == "b123...."


def test_other_branches_and_forks_while_it_runs(web: DomainScene) -> None:
    line(web)
    web("revert @ s1")
    web.write(".......x")
    web.virsh("start", "@")
    assert "not in active chain" in refused(web, "snapshot-delete", "@", "s2")
    web("delete @ s2")
    web.agree()
    web("branch @ aside --from s3")
    assert "not a leaf" in refused(web, "snapshot-delete", "@", "s1")
    web("delete @ s1")
    web.agree()
    assert (shown(web, "s3"), shown(web, "main"), shown(web, "aside")) == ("b12.....", "b......x", "b12.....")
    web("delete @ --branch aside")
    web("delete @ s3 --with-branches")
    web.agree()
    assert web.files() == {"web.qcow2"} | {web.source()[0].name} and shown(web, "main") == "b......x"
    assert "has to be off" in web("snapshot @ i1 --internal", status=REFUSED).err
    assert "is not saved yet" in web("snapshot @ m1 --memory", status=REFUSED).err
    web.virsh("destroy", "@")
    web.sound()


def test_going_elsewhere_turns_it_off_and_on(web: DomainScene) -> None:
    line(web)
    web.virsh("start", "@")
    said = web("revert @ s1")
    assert "turned off" in said.out and web.show()["state"] == "running"
    assert shown(web, "main") == "b......." and shown(web, "main.1") == "b123...."
    web("switch @ main.1 --stopped")
    assert web.show()["state"] == "off" and web.virsh_shows() == "b123...."
    web.sound()
    web("switch @ main --paused")
    assert web.show()["state"] == "paused"
    web.virsh("destroy", "@")
    web.sound()


def test_two_disks_of_one_instant(domain: DomainScene) -> None:
    domain.define("vda=web.qcow2", "vdb=data.raw")
    domain("snapshot @ s1")
    domain.virsh("start", "@")
    domain("snapshot @ s2")
    domain("snapshot @ s3 --exclude vdb")
    assert domain.record("s3").find("disks/disk[@name='vdb']").get("snapshot") == "no"
    domain("delete @ s1 s2 s3")
    domain.agree()
    assert domain.files() == {"web.qcow2", "data.raw"}
    domain.virsh("destroy", "@")
    domain.sound()


def test_what_is_merged_waits_while_it_is_paused(web: DomainScene) -> None:
    line(web)
    web.virsh("start", "@", "--paused")
    assert "is paused" in web("delete @ s2").out
    assert web.listed() == {"s1": None, "s3": "s1"} and len(web.show()["layers"]) == 4
    web.agree()
    web.virsh("resume", "@")
    web("gc @")
    web.agree()
    assert len(web.show()["layers"]) == 3
    web.virsh("destroy", "@")
    web.sound()
    assert [web.shows(each) for each in ("s1", "s3", "main")] == ["b.......", "b12.....", "b123...."]
