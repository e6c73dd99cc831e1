"""What libvirt 11.3 refuses, of a domain that is off and of one that runs: it does, snaptree does it, bytes are right,
and virsh goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.kit.domain import DomainScene, VirshRefusal, domain_scene, goes_on, grown, left_behind, refused
from tests.kit.libvirtd import Libvirtd, libvirtd_or_skip

pytestmark = pytest.mark.root
REFUSED = 6


@pytest.fixture
def web(web: DomainScene, state: str) -> DomainScene:
    """The domain, off and running."""
    web.be(state)
    return web


@contextmanager
def by_virsh_alone(own: Libvirtd, state: str, *disks: str) -> Iterator[DomainScene]:
    """Another domain, on disks of the same names, that snaptree has nothing to do with."""
    with domain_scene(own) as found:
        found.image("web.qcow2", word="b")
        found.define("vda=web.qcow2", *disks)
        found.be(state)
        yield found


def forked(web: DomainScene, name: str) -> None:
    """A branch from here: what is worked on forks where it stands only while the domain is off."""
    runs = web.runs()
    web.be("off")
    web(f"branch @ {name}")
    web.be("running" if runs else "off")


def test_b1_a_fork_point(web: DomainScene) -> None:
    grown(web, "s1", "s2")
    web.back("s1")
    grown(web, "s3")
    assert "multiple children snapshots not supported" in refused(web, "snapshot-delete", "@", "s1")
    web("delete @ s1")
    web.sound()
    assert (web.shows("s2"), web.shows("s3"), web.shows()) == ("b1......", "b.......", "b..3....")
    goes_on(web, "s2")


def test_b2_gone_back_to_it(web: DomainScene) -> None:
    grown(web, "s1", "s2", "s3")
    web.back("s2")
    web.write(".......x")
    assert "active external snapshot that is not a leaf" in refused(web, "snapshot-delete", "@", "s2")
    web("delete @ s2")
    web.sound()
    assert (web.shows("s1"), web.shows("s3"), web.shows()) == ("b.......", "b12.....", "b1.....x")
    assert web.listed() == {"s1": None, "s3": "s1"} and web.current() == "s1"
    goes_on(web, "s3")


@pytest.mark.slow
def test_b3_in_the_middle_of_another_branch(web: DomainScene) -> None:
    grown(web, "s1", "s2", "s3", "s4")
    web.back("s1")
    assert "not in active chain" in refused(web, "snapshot-delete", "@", "s3")
    web("delete @ s3")
    web.sound()
    assert (web.shows("s2"), web.shows("s4"), web.shows()) == ("b1......", "b123....", "b.......")
    assert web.listed() == {"s1": None, "s2": "s1", "s4": "s2"}
    goes_on(web, "s4")


def test_b4_children(web: DomainScene) -> None:
    grown(web, "s1", "s2", "s3")
    assert "external children disk snapshots" in refused(web, "snapshot-delete", "@", "s1", "--children-only")
    web("delete @ s1 --children-only")
    web.sound()
    assert web.listed() == {"s1": None} and web.shows() == "b123...." and web.shows("s1") == "b......."
    grown(web, "s4")
    assert "not supported" in refused(web, "snapshot-delete", "@", "s1", "--children")
    web("delete @ s1 --children")
    web.sound()
    assert web.listed() == {} and web.shows() == "b1234..." and web.files() == {"web.qcow2"}


def mixed(web: DomainScene) -> None:
    """An external snapshot between two internal ones, all virsh's."""
    web.virsh("snapshot-create-as", "@", "i0")
    web.write(".i")
    grown(web, "s2")
    web.virsh("snapshot-create-as", "@", "i3")
    web.write("...i")


@pytest.mark.parametrize("state", ["off"])
def test_b5_and_b6_internal_and_external_together(web: DomainScene) -> None:
    mixed(web)
    assert {each["name"]: each["kind"] for each in web.show()["snapshots"]} == {
        "i0": "internal", "s2": "external", "i3": "internal",
    }  # fmt: skip
    assert "external and internal children" in refused(web, "snapshot-delete", "@", "i0", "--children")
    shown = {name: web.shows(name) for name in ("i0", "s2", "i3", "main")}
    assert shown == {"i0": "b.......", "s2": "bi......", "i3": "bi2.....", "main": "bi2i...."}
    web.virsh("snapshot-delete", "@", "i3")
    assert "has internal snapshot as parent" in refused(web, "snapshot-delete", "@", "s2")
    web("delete @ s2")
    web.sound()
    assert web.shows("i0") == "b......." and web.shows() == "bi2i...."
    web("snapshot @ i5 --internal")
    web.write("......7")
    assert web.record("i5").find("disks/disk").get("snapshot") == "internal"
    web.back("i5")
    assert web.virsh_shows() == "bi2i...."
    web.virsh("snapshot-delete", "@", "i5")
    web("delete @ i0")
    web.sound()
    assert web.shows() == "bi2i...." and web.files() == {"web.qcow2"}
    grown(web, "s7")
    goes_on(web, "s7")


@pytest.mark.parametrize("state", ["off"])
def test_b5_a_subtree_of_both_kinds(web: DomainScene) -> None:
    mixed(web)
    assert "external and internal children" in refused(web, "snapshot-delete", "@", "i0", "--children")
    web("delete @ i0 --children")
    web.sound()
    assert web.listed() == {} and web.shows() == "bi2i...." and web.files() == {"web.qcow2"}
    grown(web, "s7")
    goes_on(web, "s7")


@pytest.mark.slow
def test_b8_after_a_manual_blockcommit(web: DomainScene) -> None:
    grown(web, "s1", "s2", "s3")
    base, top = web.path("s1"), web.path("s2")
    runs = web.runs()
    web.be("running")
    web.virsh("blockcommit", "@", "vda", "--base", base, "--top", top, "--wait")
    web.be("running" if runs else "off")
    assert "are not the same" in refused(web, "snapshot-delete", "@", "s2")
    assert refused(web, "snapshot-delete", "@", "s1")
    web("delete @ s2")
    web("delete @ s1")
    web.sound()
    assert web.shows() == "b123...." and web.shows("s3") == "b12....."
    goes_on(web, "s3")


@pytest.mark.slow
def test_b8_after_a_metadata_only_deletion(web: DomainScene) -> None:
    grown(web, "s1", "s2", "s3")
    web.virsh("snapshot-delete", "@", "s2", "--metadata")
    assert "are not the same" in refused(web, "snapshot-delete", "@", "s1")
    assert [each["role"] for each in web.show()["layers"]].count("loose") == 1
    web("gc @")
    web.sound()
    assert web.shows() == "b123...." and web.shows("s1") == "b......." and web.shows("s3") == "b12....."
    assert len(web.chain()) == 3
    goes_on(web, "s1")


@pytest.mark.slow
def test_b9_a_deletion_that_was_interrupted(web: DomainScene) -> None:
    grown(web, "s1", "s2", "s3")
    record = web.virsh("snapshot-dumpxml", "@", "s1", "--security-info")
    at = record.index("</disk>")
    (web.folder / "s1.xml").write_text(record[:at] + "<snapshotDeleteInProgress/>" + record[at:])
    web.virsh("snapshot-create", "@", web.folder / "s1.xml", "--redefine")
    assert "was target of not completed snapshot delete" in refused(web, "snapshot-delete", "@", "s1")
    health = {Path(each["path"]).name: each["health"] for each in web.show()["layers"]}
    assert health["web.s1"] == "half-merged"
    # What was being merged into s2's file is no more than half of it: the name can only go.
    web("delete @ s2")
    web.sound()
    assert web.shows() == "b123...." and web.shows("s1") == "b......." and web.shows("s3") == "b12....."
    goes_on(web, "s1")


def test_b10_a_disk_that_was_unplugged(domain: DomainScene, state: str) -> None:
    # A SCSI disk goes without the guest's having to agree.
    domain.define("vda=web.qcow2", "sda=data.qcow2")
    domain.be(state)
    domain.virsh("snapshot-create-as", "@", "s1", "--disk-only")
    domain.write("1")
    domain.write("2", "sda")
    domain.virsh("snapshot-create-as", "@", "s2", "--disk-only")
    domain.virsh("detach-disk", "@", "sda", "--config", *(["--live"] if state == "running" else []))
    assert "not found in domain" in refused(domain, "snapshot-delete", "@", "s2")
    assert domain.shows("s2", "sda") == "2......." and "sda" not in domain.names()["main"]["tips"]
    # The tip is nobody's now, and what it stands on stays.
    domain.left |= {domain.disks / "data.s1", domain.disks / "data.s2"}
    domain("delete @ s2")
    domain.sound()
    assert domain.left == {path for path in domain.left if path.exists()}
    # Going back brings it back.
    domain("revert @ s1")
    assert domain.shows("main", "sda") == "........" and domain.source("sda")[0] == domain.path("main", "sda")
    domain.sound()


@pytest.mark.slow
def test_b12_twice_within_a_second(web: DomainScene) -> None:
    grown(web, "s1")
    for letter in "xyz":
        web("revert @ s1 --discard")
        web.write(f".{letter}")
    assert web.shows() == "bz......" and web.shows("s1") == "b......."
    web.sound()


@pytest.mark.slow
def test_b13_a_disk_that_was_left_out(domain: DomainScene, state: str) -> None:
    with by_virsh_alone(domain.own, state, "vdb=data.qcow2") as other:
        other.virsh("snapshot-create-as", "@", "s1", "--disk-only", "--diskspec", "vdb,snapshot=no")
        other.virsh("snapshot-revert", "@", "s1")
        assert other.source("vdb")[0].name != "data.qcow2", "it has made an overlay for what was left out"
    domain.define("vda=web.qcow2", "vdb=data.qcow2")
    domain.be(state)
    domain("snapshot @ s1 --exclude vdb")
    domain.write("1")
    domain.write("2", "vdb")
    before = domain.source("vdb")[0]
    domain("revert @ s1 --discard")
    assert (
        domain.shows() == "........" and domain.shows("main", "vdb") == "2......." and domain.source("vdb")[0] == before
    )
    domain.sound()
    domain.write("3")
    domain("revert @ s1")
    assert domain.shows("main", "vdb") == domain.shows("main.1", "vdb") == "2......."
    assert (domain.shows(), domain.shows("main.1")) == ("........", "3.......")
    domain.sound()
    domain.be("off")
    domain.virsh("snapshot-create-as", "@", "by-virsh", "--disk-only", "--diskspec", "vdb,snapshot=no")
    domain.virsh("snapshot-delete", "@", "by-virsh")
    domain.back("s1")
    assert (domain.virsh_shows(), domain.virsh_shows("vdb")) == ("........", "2.......")
    assert (domain.shows("main.1"), domain.shows("main.1", "vdb")) == ("3.......", "2.......")
    left_behind(domain)
    domain("snapshot @ s2")
    domain.sound()


def test_b14_a_domain_with_snapshots_is_removed(web: DomainScene) -> None:
    grown(web, "s1", "s2")
    web("branch @ aside --from s1")
    if web.runs():
        assert "has to be off" in web("remove @ --delete-files --yes", status=REFUSED).err
        web.be("off")
    assert "snapshots" in refused(web, "undefine", "@")
    web("remove @ --delete-files --yes")
    assert web.name not in web.virsh("list", "--all", "--name").split() and web.files() == set()
    assert web("list --json").json == [] or web.name not in {each["machine"] for each in web("list --json").json}


@pytest.mark.slow
def test_c14_and_c15_virsh_does_no_harm_to_what_snaptree_has_written(web: DomainScene, state: str) -> None:
    with by_virsh_alone(web.own, state) as other:
        grown(other, "s1", "s2")
        point = other.path("s2")
        other.back("s1")
        other.virsh("snapshot-create-as", "@", "y", "--disk-only")
        other.virsh("snapshot-delete", "@", "y")
        time.sleep(1.1)  # virsh names its overlays by the second.
        try:
            other.virsh("snapshot-revert", "@", "s2")
        except VirshRefusal as error:
            assert state == "running" and "Cannot access backing file" in str(error)
        assert not point.exists(), "libvirt has unlinked what it goes back to"
    web("snapshot @ s1")
    web.write(".1")
    web("snapshot @ s2")
    web.write("..2")
    web("revert @ s1 --discard")
    # What libvirt does by itself here unlinks the point of s2: after these records it does not.
    web.virsh("snapshot-create-as", "@", "y", "--disk-only")
    web.virsh("snapshot-delete", "@", "y")
    web.back("s2")
    assert web.virsh_shows() == "b1......" and web.shows("s2") == "b1......"
    left_behind(web)
    # With the roots gone there is a current one still.
    web("delete @ s1")
    forked(web, "other")
    web("switch @ other")
    web("delete @ s2")
    web.sound()
    for name in [each for each in web.listed() if each != "snaptree-placeholder"]:
        time.sleep(1.0)  # virsh names its overlays by the second.
        web.back(name)
    assert web.virsh("list", "--all", "--name")


@pytest.mark.slow
def test_c15_what_crashes_libvirt_by_itself_does_not_after_snaptree(state: str) -> None:
    """In a libvirtd of its own, since that dies of it."""
    with libvirtd_or_skip(lasting=True) as own, by_virsh_alone(own, "off") as web:
        grown(web, "s1", "s2")
        web.back("s1")
        web.virsh("snapshot-delete", "@", "s1", "--metadata")
        web.be(state)
        assert web.current() is None and web.listed() == {"s2": None}
        before = own.process()
        time.sleep(1.1)  # virsh names its overlays by the second.
        assert "End of file while reading data" in refused(web, "snapshot-revert", "@", "s2")
        own.wait()
        assert own.process() != before, "libvirtd has died of it, and was started again"
        assert "record of" in web("verify @", status=13).out
        web("verify @ --repair")
        left_behind(web)
        assert web.current() == "snaptree-placeholder" and web.shows("s2") == "b1......"
        web.sound()
        before = own.process()
        goes_on(web, "s2")
        assert own.process() == before


def test_c15_what_grew_beside_the_active_line_does_not_crash_libvirt(web: DomainScene) -> None:
    forked(web, "first")
    web("snapshot @ s2")
    web.write(".2")
    web.virsh("snapshot-create-as", "@", "v3", "--disk-only")
    forked(web, "aside")
    web.write("..x")
    # Without what snaptree has written for that, libvirtd 11.3 dies of it.
    assert "not completed snapshot delete" in refused(web, "snapshot-delete", "@", "s2")
    web("delete @ s2")
    web.sound()
    assert (web.shows("v3"), web.shows("aside"), web.shows()) == ("b2......", "b2......", "b2x.....")
