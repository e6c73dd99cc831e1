"""What people do to a domain beside snaptree: both go on from there, and nothing that libvirt is told is amiss."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from lxml import etree
from tests.kit import images
from tests.kit.domain import URI, DomainScene, VirshRefusal, goes_on, grown, left_behind, line, refused
from tests.kit.scene import word_of

pytestmark = pytest.mark.root
LONG = pytest.mark.slow
STATES = pytest.mark.parametrize("state", [pytest.param("off", marks=LONG), "running"])


@STATES
def test_a_domain_was_pulled_up(web: DomainScene, state: str) -> None:
    grown(web, "s1", "s2", "s3")
    web.be("running")
    web.virsh("blockpull", "@", "vda", "--base", web.path("s2"), "--wait")
    web.be(state)
    assert "are not the same" in refused(web, "snapshot-delete", "@", "s3")
    assert "could not find base disk source" in refused(web, "snapshot-delete", "@", "s2")
    web("delete @ s3")
    web("delete @ s2")
    left_behind(web)
    assert (web.shows("s1"), web.shows()) == ("b.......", "b123....")
    web.sound()
    goes_on(web, "s1")


@STATES
def test_a_branch_was_made(web: DomainScene, state: str) -> None:
    """With ``qemu-img create`` and ``virsh define``; the tip of before stays, and what it shows."""
    grown(web, "s1", "s2", "s3")
    mine, old = web.disks / "mine.qcow2", web.source()[0]
    images.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", web.path("s2"), "-F", "qcow2", mine)
    mine.chmod(0o600)
    root = etree.fromstring(web.virsh("dumpxml", "@", "--inactive"))
    (disk,) = root.findall("devices/disk")
    for chain in disk.findall("backingStore"):
        disk.remove(chain)
    source = disk.find("source")
    assert source is not None
    source.set("file", str(mine))
    web.define_xml(etree.tostring(root, encoding="unicode"))
    web.be(state)
    assert "are not the same" in refused(web, "snapshot-delete", "@", "s3")
    web("delete @ s3")
    web("delete @ s2")
    left_behind(web)
    web.be("off")
    assert (web.shows("s1"), web.shows()) == ("b.......", "b1......")
    assert word_of(images.read(old)) == "b123....", "nobody has said that it may go"
    web.sound()
    goes_on(web, "s1")


def test_virsh_goes_on_twice_while_it_runs(web: DomainScene) -> None:
    """Without ``verify --repair`` in between."""
    line(web, "s1", "s2")
    web("branch @ other --from s1")
    web.be("running")
    web.virsh("snapshot-create-as", "@", "v3", "--disk-only")
    web.write("...3")
    web.virsh("snapshot-create-as", "@", "v4", "--disk-only")
    web.virsh("snapshot-delete", "@", "v3")
    web.write("....4")
    web("delete @ s2")
    web("delete @ v4")
    left_behind(web)
    assert (web.shows(), web.shows("other")) == ("b1234...", "b.......")
    web.sound()
    goes_on(web, "s1")


@STATES
def test_b4_virsh_goes_on(web: DomainScene, state: str) -> None:
    web.be(state)
    grown(web, "s1", "s2", "s3")
    web("delete @ s1 --children-only")
    web.sound()
    goes_on(web, "s1")


@STATES
def test_b10_virsh_goes_on(domain: DomainScene, state: str) -> None:
    domain.define("vda=web.qcow2", "sda=data.qcow2")
    domain.be(state)
    domain.virsh("snapshot-create-as", "@", "s1", "--disk-only")
    domain.write("1")
    domain.virsh("snapshot-create-as", "@", "s2", "--disk-only")
    domain.virsh("detach-disk", "@", "sda", "--config", *(["--live"] if state == "running" else []))
    domain.left |= {domain.disks / "data.s1", domain.disks / "data.s2"}
    domain("delete @ s2")
    domain.sound()
    goes_on(domain, "s1")


@STATES
def test_b12_virsh_cannot_go_back_so_often(web: DomainScene, state: str) -> None:
    """virsh names its overlays by the second."""
    web.be(state)
    grown(web, "s1")
    said = []
    for _ in range(6):
        try:
            web.virsh("snapshot-revert", "@", "s1")
        except VirshRefusal as error:
            said.append(str(error))
    assert any("already exists" in each for each in said)
    for letter in "xyz":
        web("revert @ s1 --discard")
        web.write(f".{letter}")
    left_behind(web)
    web.sound()
    goes_on(web, "s1")


def test_what_is_sent_is_as_the_schema_has_it(web: DomainScene, sent: list[str]) -> None:
    """Which ``sent`` sees to, in this test of all kinds of records as in every other."""
    web.define("vda=web.qcow2", "vdb=data.qcow2", devices="<graphics type='vnc' port='-1' passwd='secret'/>")
    line(web, "s1", "s2")
    web("snapshot @ s3 --exclude vdb --description x")
    web("snapshot @ i4 --internal")
    for each in ("branch @ other --from s1", "switch @ other", "delete @ s1"):
        web(each)
    web.be("running")
    for each in ("snapshot @ m5 --memory", "revert @ m5", "delete @ m5 --memory-only", "delete @ s2"):
        web(each)
    assert {"s2", "s3", "i4", "m5"} <= set(sent)
    assert "tainted" not in web.virsh("dominfo", "@")


@pytest.mark.parametrize("how", ["gone", "put back"])
def test_what_the_metadata_says_is_found_again(web: DomainScene, how: str) -> None:
    """It is dropped, or what it was when a snapshot was taken, as going back with virsh leaves it."""
    line(web, "s1", "s2")
    web("branch @ feature --from s1")
    before = web.virsh("dumpxml", "@", "--inactive")
    web("switch @ feature")
    was = web.show()
    if how == "gone":
        web.virsh("metadata", "@", "--uri", "urn:snaptree:domain:1", "--remove", "--config")
    else:
        after, old = (etree.fromstring(each) for each in (web.virsh("dumpxml", "@", "--inactive"), before))
        now, then = (each.find("metadata") for each in (after, old))
        assert now is not None and then is not None
        after.replace(now, then)
        web.define_xml(etree.tostring(after, encoding="unicode"))
    found = web.show()
    for key in ("active_branch", "snapshots", "layers"):
        assert found[key] == was[key], key
    assert {each["name"]: each for each in found["branches"]} == {each["name"]: each for each in was["branches"]}


def test_names_are_completed(web: DomainScene) -> None:
    line(web, "s1")
    web("branch @ feature --from s1")

    def completed(words: str, at: int, uri: str | None = web.own.uri) -> list[str]:
        place = {key: value for key, value in os.environ.items() if key != URI} | ({URI: uri} if uri else {})
        place |= {"SNAPTREE_STATE": str(web.state), "_SNAPTREE_COMPLETE": "bash_complete"}
        place |= {"COMP_WORDS": words, "COMP_CWORD": str(at)}
        code = "import sys; sys.argv[0] = 'snaptree'; from snaptree.cli.main import run; sys.exit(run(sys.argv[1:]))"
        done = subprocess.run([sys.executable, "-c", code], env=place, capture_output=True, text=True, check=False)
        return [each.partition(",")[2] for each in done.stdout.splitlines()]

    assert web.name in completed("snaptree tree web", 2)
    assert completed(f"snaptree delete {web.name} ", 3) == ["s1"]
    assert "feature" in completed(f"snaptree switch {web.name} ", 3)
    assert completed(f"snaptree delete --connect {web.own.uri} {web.name} ", 5, None) == ["s1"]


def test_it_is_named_by_its_id(web: DomainScene) -> None:
    web.be("running")
    assert web(f"show {web.virsh('domid', '@').strip()} --json").json["machine"] == web.name


@pytest.mark.parametrize("how", [pytest.param("shallow", marks=LONG), "whole"])
@pytest.mark.parametrize("whose", [pytest.param("virsh's", marks=LONG), "snaptree's"])
def test_the_disk_was_copied_to_another_file(web: DomainScene, how: str, whose: str) -> None:
    """It is there that work goes on: that file keeps its name, and what stood in its place stays as it is."""
    (grown if whose == "virsh's" else line)(web, "s1", "s2")
    web.be("running")
    old, copy = web.source()[0], web.disks / "copy.qcow2"
    shallow = ["--shallow"] if how == "shallow" else []
    web.virsh("blockcopy", "@", "vda", "--dest", copy, *shallow, "--wait", "--pivot", "--transient-job")
    web.left.add(old)
    found = web.findings("@")
    said = [each["detail"] for each in found if each["kind"] == "records"]
    # The records know nothing of it; that the copy of all stands on nothing libvirt says in the definition.
    assert any("record of 's2'" in each for each in said) and any("metadata" in each for each in said)
    assert any("stands on" in each and "believes" in each for each in said) == (how == "whole")
    assert not [each for each in said if "does not say" in each and "record" not in each], said
    (outsider,) = [each["detail"] for each in found if each["kind"] == "outsider"]
    assert f"{old} stands on" in outsider
    web("verify @ --repair")
    web.agree()
    assert web.chain() == ["copy.qcow2", *(web.chain("s2") if how == "shallow" else [])]
    assert (web.shows("s1"), web.shows("s2"), web.shows()) == ("b.......", "b1......", "b12.....")
    if how == "shallow":
        # What stood in its place is somebody's who takes it away; otherwise it stays, and so does what it stands on.
        old.unlink()
        web.left.clear()
    web("delete @ s1")
    web.agree()
    web("delete @ s2 --merge none")
    web.agree()
    web.be("off")
    web("gc @")
    assert web.chain() == (["copy.qcow2"] if how == "whole" else ["web.qcow2"]) and web.shows() == "b12....."
    assert web.files() == set(web.chain()) or how == "whole"
    left_behind(web)
    web.sound()
    line(web, "s3")
    goes_on(web, "s3")


def test_what_goes_past_libvirt_is_noticed(web: DomainScene) -> None:
    """By what all these tests look at: libvirt notes it of a domain that runs."""
    web.be("running")
    web("snapshot @ s1")
    web.agree()
    web.virsh("qemu-monitor-command", "@", "--hmp", "info status")
    with pytest.raises(AssertionError, match="tainted: custom monitor"):
        web.agree()
