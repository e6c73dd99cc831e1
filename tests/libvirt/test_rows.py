"""What external snapshots are for (rows A) on a domain, off and running; and which test has each row of a domain's.

Each ends with virsh at work on what is left. Rows B and C are in ``test_what_libvirt_refuses.py``.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.domain import REFUSES as WORDS
from tests.kit.domain import DomainScene, goes_on, grown, line, refused
from tests.kit.scene import SLOT, SLOTS
from tests.libvirt.test_what_libvirt_refuses import by_virsh_alone

pytestmark = pytest.mark.root
LONG = pytest.mark.slow
REFUSED = 6
HERE = Path(__file__).parent
ROWS = {f"a{number}" for number in range(1, 9)}
ROWS |= {f"b{number}" for number in (*range(1, 11), 12, 13, 14)} | {"c14", "c15"}
"""Those that libvirt's domains have: all of A, and of the others those of which libvirt 11.3 behaves as they say."""
REFUSES, BY_HAND = "test_what_libvirt_refuses.py::", "test_by_hand.py::"
BOTH = {
    "a1": ["test_rows.py::test_a1_the_name_goes_and_the_files_stay_until_gc"],
    "a2": ["test_rows.py::test_a2_the_chain_is_as_short_as_before"],
    "a4": ["test_rows.py::test_a4_the_experiments_are_thrown_away"],
    "a6": ["test_rows.py::test_a6_two_lines_from_one_point"],
    "a7": ["test_rows.py::test_a7_the_fork_goes_when_the_last_line_goes"],
    "a8": ["test_rows.py::test_a8_the_middle_goes", "test_rows.py::test_a8_a_chain_without_snapshots_is_squashed"],
    "b1": [REFUSES + "test_b1_a_fork_point"],
    "b2": [REFUSES + "test_b2_gone_back_to_it"],
    "b3": [REFUSES + "test_b3_in_the_middle_of_another_branch"],
    "b4": [REFUSES + "test_b4_children", BY_HAND + "test_b4_virsh_goes_on"],
    "b8": [
        *(REFUSES + "test_b8_after_a_manual_blockcommit", REFUSES + "test_b8_after_a_metadata_only_deletion"),
        *(BY_HAND + "test_a_domain_was_pulled_up", BY_HAND + "test_a_branch_was_made"),
    ],
    "b9": [REFUSES + "test_b9_a_deletion_that_was_interrupted", "test_interrupted.py::test_b9_snaptree_finishes_it"],
    "b10": [REFUSES + "test_b10_a_disk_that_was_unplugged", BY_HAND + "test_b10_virsh_goes_on"],
    "b12": [REFUSES + "test_b12_twice_within_a_second", BY_HAND + "test_b12_virsh_cannot_go_back_so_often"],
    "b13": [REFUSES + "test_b13_a_disk_that_was_left_out"],
    "b14": [REFUSES + "test_b14_a_domain_with_snapshots_is_removed"],
    "c14": [REFUSES + "test_c14_and_c15_virsh_does_no_harm_to_what_snaptree_has_written"],
    "c15": [
        REFUSES + "test_c15_what_crashes_libvirt_by_itself_does_not_after_snaptree",
        REFUSES + "test_c15_what_grew_beside_the_active_line_does_not_crash_libvirt",
    ],
}
"""Tests that are run with the domain off and with the domain running."""
OFF = {
    "a3": ["test_more_domains.py::test_memory_that_virsh_has_saved"],
    "b5": [REFUSES + "test_b5_and_b6_internal_and_external_together"],
    "b6": [REFUSES + "test_b5_and_b6_internal_and_external_together"],
}
RUNNING = {
    "a3": ["test_memory.py::test_only_the_memory_goes"],
    "a5": ["test_memory.py::test_what_is_not_wanted_goes"],
    "b5": ["test_rows.py::test_b5_a_mixed_subtree"],
    "b6": ["test_rows.py::test_b6_an_external_one_with_an_internal_parent"],
    "b7": ["test_rows.py::test_b7_an_internal_one_below_an_overlay"],
}
NOT_OFF = {"b7": "it is of a domain that runs", "a5": "it is of a domain that runs"}
ALONE = ("refused(", "VirshRefusal", "by_virsh_alone(")
"""One of these shows what virsh does by itself."""
BY_ITSELF = {
    "a2": "virsh does it",
    "a3": "virsh has no word for it",
    "a4": "virsh does it by two commands",
    "a5": "virsh does it",
}
"""Rows of A in which there is nothing that virsh refuses or fails at."""
ON = ("goes_on(", "by-virsh", ".back(")
"""One of these has virsh go on with what is left."""


@functools.cache
def functions_of(file: str) -> dict[str, tuple[ast.FunctionDef, str]]:
    text = (HERE / file).read_text(encoding="utf-8")
    found = [each for each in ast.parse(text).body if isinstance(each, ast.FunctionDef)]
    return {each.name: (each, ast.get_source_segment(text, each) or "") for each in found}


def test_every_row_has_its_tests() -> None:
    """They begin with what virsh does by itself, where it does not do it; and virsh goes on at the end, if anything is
    left."""
    assert set(BOTH) | set(OFF) | set(NOT_OFF) == ROWS
    assert set(BOTH) | set(RUNNING) == ROWS
    for tests in (BOTH, OFF, RUNNING):
        for row, places in tests.items():
            said = ""
            for file, _, name in (each.partition("::") for each in places):
                functions = functions_of(file)
                assert name in functions, (row, name)
                function, source = functions[name]
                said += source
                if tests is BOTH:
                    words = {each.arg for each in function.args.args}
                    whole = {each.arg for each in functions["web"][0].args.args} if "web" in functions else set()
                    assert "state" in words or ("web" in words and "state" in whole), (row, name)
            assert row in BY_ITSELF or any(each in said for each in ALONE), row
            assert row == "b14" or any(each in said for each in ON), row


@pytest.fixture
def web(web: DomainScene, state: str) -> DomainScene:
    """The domain, off and running."""
    web.be(state)
    return web


def test_a1_the_name_goes_and_the_files_stay_until_gc(web: DomainScene) -> None:
    with by_virsh_alone(web.own, "running" if web.runs() else "off") as other:
        grown(other, "s1", "s2", "s3")
        other.virsh("snapshot-delete", "@", "s2", "--metadata")
        assert "are not the same" in refused(other, "snapshot-delete", "@", "s1")
    line(web, "s1", "s2", "s3")
    left = images.create(web.disks / "left.qcow2", SLOTS * SLOT, backing=(web.path("s3"), "qcow2"))
    web.left.add(left)
    files = web.files()
    plan = web("delete @ s2 --merge none --plan --json").json
    assert plan["bytes_to_copy"] == 0 and plan["way"] is None
    web("delete @ s2 --merge none")
    assert web.files() == files and web.listed() == {"s1": None, "s3": "s1"}
    web.sound()
    said = web("gc @")
    assert str(left) in said.out and left.exists()
    if web.runs():
        # What stands on the upper layer keeps it, and libvirt pulls into the tip alone.
        assert len(web.chain()) == 4
        web.be("off")
        web("gc @")
    assert len(web.chain()) == 3 and left.exists()
    assert (web.shows("s1"), web.shows("s3"), web.shows()) == ("b.......", "b12.....", "b123....")
    web.sound()
    left.unlink()
    web.left.clear()
    goes_on(web, "s1")


@pytest.mark.parametrize("way", ["auto", pytest.param("commit", marks=LONG), pytest.param("pull", marks=LONG)])
def test_a2_the_chain_is_as_short_as_before(web: DomainScene, way: str) -> None:
    line(web, "s1", "s2")
    web(f"delete @ s2 --merge {way}")
    assert len(web.chain()) == 2 and web.listed() == {"s1": None}
    assert (web.shows("s1"), web.shows()) == ("b.......", "b12.....")
    web.sound()
    web(f"delete @ s1 --merge {way}")
    # A name can be given back only while it is off.
    web.be("off")
    web("gc @")
    assert web.shows() == "b12....." and web.listed() == {} and web.chain() == ["web.qcow2"]
    web.sound()
    line(web, "s3")
    goes_on(web, "s3")


def test_a4_the_experiments_are_thrown_away(web: DomainScene) -> None:
    line(web, "s1", "s2")
    web.write("xxxx")
    runs = web.runs()
    web("revert @ s2 --discard --delete")
    assert web.runs() == runs
    assert web.listed() == {"s1": None} and web.shows() == web.virsh_shows() == "b1......" and len(web.chain()) == 2
    web.sound()
    goes_on(web, "s1")


def test_a6_two_lines_from_one_point(web: DomainScene) -> None:
    """Each with its own tip to return to, in a file of the user's name."""
    with by_virsh_alone(web.own, "running" if web.runs() else "off") as other:
        grown(other, "s1")
        tip = other.source()[0]
        other.back("s1")
        assert not tip.exists(), "virsh goes back by throwing away what was there"
    line(web, "s1")
    web("branch @ feature --from s1 --file vda=feature-1.qcow2")
    assert web.path("feature").name == "feature-1.qcow2" and web.listed()["feature"] == "s1"
    runs = web.runs()
    web("switch @ feature")
    assert web.source()[0].name == "feature-1.qcow2" and web.runs() == runs
    web.write("..f")
    web("switch @ main")
    web.write("...m")
    web("switch @ feature")
    web.write("....f")
    assert (web.shows("main"), web.shows("feature"), web.shows("s1")) == ("b1.m....", "b.f.f...", "b.......")
    web.sound()
    goes_on(web, "s1")


def test_a7_the_fork_goes_when_the_last_line_goes(web: DomainScene) -> None:
    line(web, "s1")
    web("branch @ other --from s1")
    web("branch @ third --from s1")
    assert WORDS["B2"] in refused(web, "snapshot-delete", "@", "s1")
    before = web.path("s1").read_bytes()
    web("delete @ s1")
    assert web.disks.joinpath("web.qcow2").read_bytes() == before, "nobody writes to what others stand on"
    assert (web.shows("main"), web.shows("other"), web.shows("third")) == ("b1......", "b.......", "b.......")
    web.sound()
    web("delete @ --branch third")
    web("switch @ other")
    web.write("..o")
    web("delete @ --branch main")
    assert web.shows("other") == "b.o....." and web.listed().keys() <= {"snaptree-placeholder"}
    web.be("off")
    web("gc @")
    assert len(web.chain("other")) == 1
    web.sound()
    web("snapshot @ s2")
    goes_on(web, "s2")


@pytest.mark.parametrize("way", ["auto", pytest.param("commit", marks=LONG), pytest.param("pull", marks=LONG)])
def test_a8_the_middle_goes(web: DomainScene, way: str) -> None:
    line(web, "s1", "s2", "s3")
    said = web(f"delete @ s2 --merge {way}")
    if web.runs() and way == "pull":
        assert "libvirt pulls nothing into" in said.out and len(web.chain()) == 4
        web("gc @")
    assert (web.shows("s1"), web.shows("s3"), web.shows()) == ("b.......", "b12.....", "b123....")
    assert len(web.chain()) == 3 and web.listed() == {"s1": None, "s3": "s1"}
    web.sound()
    goes_on(web, "s3")


def test_a8_the_root_is_asked_to_go_up(web: DomainScene) -> None:
    """libvirt would pull it into the tip, and all between, also where only rights speak against it."""
    line(web, "s1", "s2")
    web.path("s1").chmod(0o600)
    web.path("s2").chmod(0o644)
    said = web("delete @ s1 --merge pull")
    if web.runs():
        assert "libvirt pulls nothing into" in said.out and len(web.chain()) == 3
        web.sound()
        web("gc @")
    assert (web.shows("s2"), web.shows()) == ("b1......", "b12.....")
    assert len(web.chain()) == 2 and web.listed() == {"s2": None}
    web.sound()


def test_a8_a_chain_without_snapshots_is_squashed(web: DomainScene) -> None:
    """Such as backup programs leave: what the disk stands on is foreign until the user says that it is not."""
    for name in ("x1", "x2", "x3"):
        web.virsh("snapshot-create-as", "@", name, "--disk-only", "--no-metadata")
        web.write("." * int(name[-1]) + name[-1])
    if not web.runs():
        assert "could not find base image" in refused(web, "blockcommit", "@", "vda", "--wait")
    assert [each["owned"] for each in web.show()["layers"]].count(True) == 1
    assert "foreign" in web("squash @ --disk vda", status=REFUSED).err
    other = images.create(web.disks / "other.qcow2", SLOTS * SLOT, backing=(web.disks / "web.x1", "qcow2"))
    plan = web("set @ --adopt --plan")
    assert "web.x2 is" in plan.out and "other.qcow2" in plan.out and "web.x1 and what is beneath it stay" in plan.out
    other.unlink()
    web("set @ --adopt")
    assert all(each["owned"] for each in web.show()["layers"])
    assert "stand on nothing" in web("set @ --adopt", status=REFUSED).err
    web(f"squash @ --disk vda --top {web.disks}/web.x2 --base {web.disks}/web.qcow2")
    assert web.chain() == ["web.x3", "web.qcow2"] and web.shows() == "b123...."
    web.agree()
    web("squash @ --disk vda")
    assert web.chain() == ["web.qcow2"] and web.shows() == "b123...." and web.files() == {"web.qcow2"}
    web.sound()
    line(web, "s1")
    goes_on(web, "s1")


def runs_above_an_internal(web: DomainScene) -> None:
    """virsh's internal ``i0``, and its external ``s2`` that grew from it."""
    web.be("off")
    web.virsh("snapshot-create-as", "@", "i0")
    web.write(".i")
    web.virsh("snapshot-create-as", "@", "s2", "--disk-only")
    web.write("..2")
    web.be("running")


@LONG
@pytest.mark.parametrize("state", ["running"])
def test_b6_an_external_one_with_an_internal_parent(web: DomainScene) -> None:
    """What goes down goes into the layer that has it, which shows it as before."""
    runs_above_an_internal(web)
    assert "has internal snapshot as parent" in refused(web, "snapshot-delete", "@", "s2")
    web("delete @ s2")
    assert (web.shows("i0"), web.shows()) == ("b.......", "bi2.....") and web.files() == {"web.qcow2"}
    assert web.listed() == {"i0": None}
    web.sound()
    web.be("off")
    assert web.shows() == "bi2....."
    web("snapshot @ s3")
    goes_on(web, "s3")


def names_of_internals(web: DomainScene, file: str) -> list[str]:
    return [each["name"] for each in images.info(web.disks / file).get("snapshots", [])]


@pytest.mark.parametrize("state", ["running"])
def test_b7_an_internal_one_below_an_overlay(web: DomainScene) -> None:
    """libvirt has no call for it: the name goes, and what it had when the domain is off."""
    web.be("off")
    for name in ("i0", "i1"):
        web(f"snapshot @ {name} --internal")
        web.write("." * (int(name[-1]) + 1) + name[-1])
    web("snapshot @ s2")
    web.write("...z")
    web("snapshot @ s3")
    web.be("running")
    assert "is not the same as disk image currently used by VM" in refused(web, "snapshot-delete", "@", "i0")
    before = {each: web.shows(each) for each in ("i1", "s2", "s3", "main")}
    plan = web("delete @ i0 --plan")
    assert "until the domain is off" in plan.out
    web("delete @ i0")
    assert web.listed() == {"i1": None, "s2": "i1", "s3": "s2"}
    assert {each: web.shows(each) for each in before} == before and set(web.names()) == set(before)
    web.sound()
    web("gc @")
    assert names_of_internals(web, "web.qcow2") == ["i0", "i1"], "QEMU has it open"
    web("delete @ s2")
    web.be("off")
    web("gc @")
    assert names_of_internals(web, "web.qcow2") == ["i1"] and web.shows("i1") == before["i1"]
    assert web.shows() == before["main"] and web.shows("s3") == before["s3"]
    web.sound()
    goes_on(web, "s3")


@LONG
@pytest.mark.parametrize("state", ["running"])
def test_b5_a_mixed_subtree(web: DomainScene) -> None:
    runs_above_an_internal(web)
    assert "for internal snapshot 'i0'" in refused(web, "snapshot-delete", "@", "i0", "--children")
    web("delete @ i0 --children")
    assert web.listed() == {} and web.shows() == "bi2....." and web.files() == {"web.qcow2"}
    web.sound()
    web("snapshot @ i0")
    web.write("...n")
    web.sound()
    web.be("off")
    web("gc @")
    assert names_of_internals(web, "web.qcow2") == []
    assert (web.shows("i0"), web.shows()) == ("bi2.....", "bi2n....")
    web.sound()
    goes_on(web, "i0")
