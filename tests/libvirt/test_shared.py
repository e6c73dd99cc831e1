"""A domain that runs, on a file system that shares blocks: layers are merged by a block copy of libvirt's.

Killing is done around everything that libvirt is told, around every change of a file, and to QEMU instead.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lxml import etree
from tests.kit import images
from tests.kit.disks import seen_by_all
from tests.kit.domain import DomainScene, domain_scene, line, of_libvirt
from tests.kit.domain_guest import Written
from tests.kit.guest import DISKS
from tests.kit.images import MiB
from tests.kit.libvirtd import Libvirtd, libvirtd_or_skip
from tests.kit.locked import require_locked
from tests.kit.scene import standing_on
from tests.kit.stage import kill_and_wait, killed_at, processes_of
from tests.kit.told import run_killed

from snaptree.errors import IoError, ToolError
from snaptree.images import durable
from snaptree.running.carry import domain_swap

pytestmark = pytest.mark.root
BUSY, REFUSED = 5, 6
SIZE = 600 << 20


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """XFS, mounted before libvirtd is started: it sees no other."""
    with seen_by_all("xfs", SIZE) as found:
        yield found


@pytest.fixture(scope="module")
def sharing(place: Path) -> Iterator[Libvirtd]:
    """A libvirtd that sees it, with images labelled as by default."""
    with libvirtd_or_skip(keep=place) as found:
        yield found


@pytest.fixture
def domain(sharing: Libvirtd, place: Path) -> Iterator[DomainScene]:
    """An empty folder for images; no domain yet."""
    with domain_scene(sharing, place) as found:
        yield found


@pytest.fixture
def web(domain: DomainScene) -> DomainScene:
    """A domain with one qcow2 disk that shows ``b.......``, and ``s1``, ``s2``, ``s3`` in a row."""
    domain.image("web.qcow2", word="b")
    domain.define("vda=web.qcow2")
    line(domain)
    return domain


def chain_of_libvirt(web: DomainScene, disk: str = "vda") -> list[str]:
    """The files of a disk of the domain that runs, as libvirt tells them, top first."""
    found: list[str] = []
    root: Any = etree.fromstring(web.virsh("dumpxml", "@"))
    at = next(each for each in root.findall("devices/disk") if each.find("target").get("dev") == disk)
    while at is not None and at.find("source") is not None:
        found.append(at.find("source").get("file"))
        at = at.find("backingStore")
    return found


def chain_of_snaptree(web: DomainScene, disk: str = "vda") -> list[str]:
    """The same as snaptree tells it."""
    return [path for path, _ in standing_on(str(web.path("main", disk)), web.show())]


def opened(web: DomainScene) -> set[str]:
    """What the domain's QEMU has open of its disks."""
    (process,) = processes_of(web.folder)
    files = {os.readlink(each) for each in Path(f"/proc/{process}/fd").iterdir() if each.is_symlink()}
    return {each for each in files if each.startswith(str(web.disks))}


def alike(web: DomainScene, *disks: str) -> None:
    """libvirt, snaptree and QEMU have the same files, no job goes on, and libvirt's records say so."""
    web.agree()
    files: set[str] = set()
    for disk in disks or ("vda",):
        assert chain_of_libvirt(web, disk) == chain_of_snaptree(web, disk)
        assert web.virsh("blockjob", "@", disk, "--info").strip() == ""
        files |= set(chain_of_snaptree(web, disk))
    assert opened(web) == files


def virsh_goes_on(web: DomainScene) -> None:
    """virsh takes a snapshot of what runs, looks at all, and deletes it."""
    here = web.shows("main")
    web.virsh("snapshot-create-as", "@", "by-virsh", "--disk-only")
    assert "by-virsh" in web.virsh("snapshot-list", "@", "--tree")
    for name in web.listed():
        assert "<domainsnapshot>" in web.virsh("snapshot-dumpxml", "@", name)
    assert web.virsh("domblklist", "@").split()[1] == chain_of_libvirt(web)[0]
    web.virsh("snapshot-delete", "@", "by-virsh")
    assert web.shows("main") == here and "by-virsh" not in web.listed()


def stopped(web: DomainScene) -> None:
    """Turn it off; names that could not be had while it ran are."""
    web.virsh("destroy", "@")
    web("gc @")
    web.forgiven.add("leaks")
    web.sound()
    assert "web.qcow2" in web.files() and web.show()["pending"] == []


SHAPES = {
    "s2": "in the middle",
    "s1": "the root",
    "s3": "the tip",
    "s1 s2": "the root and more",
    "s2 s3": "up to the tip",
    "s1 s3": "two rows of one disk",
    "s1 s2 s3": "everything",
}
QUICK = ("s2", "s1 s3", "s1 s2 s3")
"""Those that are run by default."""


@pytest.mark.parametrize(
    "gone", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in SHAPES]
)
def test_blocks_are_shared_while_it_runs(web: DomainScene, gone: str) -> None:
    before = {name: web.shows(name) for name in web.names()}
    tip = web.source()[0]
    web.virsh("start", "@")
    process = processes_of(web.folder)
    plan = web(f"delete @ {gone} --merge reflink --plan --json").json
    assert "reflink" in plan["way"] and plan["bytes_to_copy"] < MiB and plan["bytes_to_share"] > 0
    assert "domain-swap" in [each["kind"] for each in plan["steps"]]
    assert web.source()[0] == tip and set(web.listed()) == {"s1", "s2", "s3"}
    web(f"delete @ {gone} --merge reflink")
    assert processes_of(web.folder) == process and str(web.source()[0]) == plan["paths_after"]["vda"]
    alike(web)
    assert len(web.show()["layers"]) == 4 - len(gone.split())
    kept = {name: word for name, word in before.items() if name not in gone.split()}
    assert {name: web.shows(name) for name in kept} == kept == {name: web.shows(name) for name in web.names()}
    virsh_goes_on(web)
    web("snapshot @ after")
    alike(web)
    web("delete @ after --merge reflink")
    alike(web)
    stopped(web)
    assert {name: web.shows(name) for name in web.names()} == kept


def test_a_fork_gets_copies_of_its_own(web: DomainScene) -> None:
    web("branch @ other --from s2")
    before = {name: web.shows(name) for name in web.names()}
    web.virsh("start", "@")
    web("delete @ s2 --merge reflink")
    alike(web)
    del before["s2"]
    assert {name: web.shows(name) for name in web.names()} == before
    stopped(web)
    assert {name: web.shows(name) for name in web.names()} == before


def test_two_disks_go_over_together(domain: DomainScene) -> None:
    domain.define("vda=web.qcow2", "vdb=data.raw")
    for number in range(1, 5):
        domain(f"snapshot @ s{number}" + (" --exclude vdb" if number == 3 else ""))
        domain.write("." * number + str(number))
        domain.write("." * number + str(number), "vdb")
    before = {name: [domain.shows(name, disk) for disk in ("vda", "vdb")] for name in ("s1", "s4", "main")}
    domain.virsh("start", "@")
    domain("delete @ s2 s3 --merge reflink")
    alike(domain, "vda", "vdb")
    # A raw root has to stay raw.
    said = domain("delete @ s1 --merge reflink").out
    assert "stays so unless" in said
    alike(domain, "vda", "vdb")
    domain.virsh("destroy", "@")
    domain("gc @")
    domain.forgiven.add("leaks")
    domain.sound()
    for name in ("s4", "main"):
        assert [domain.shows(name, disk) for disk in ("vda", "vdb")] == before[name]


def test_it_is_done_by_itself_where_it_is_worth_it(domain: DomainScene) -> None:
    images.create(domain.disks / "web.qcow2", 64 * MiB)
    domain.define("vda=web.qcow2")
    for number in range(1, 4):
        domain(f"snapshot @ s{number}")
        path, form = domain.source()
        images.io(path, form, f"write -P {48 + number} {(number - 1) * 20 * MiB} {20 * MiB if number == 1 else MiB}")
    domain.virsh("start", "@")
    assert domain("delete @ s1 --plan --json").json["way"] in ("reflink", "commit+reflink")
    # So little is rather copied.
    assert domain("delete @ s2 --plan --json").json["way"] == "commit"
    domain.virsh("suspend", "@")
    assert "is paused" in domain("delete @ s1").out
    domain.virsh("resume", "@")
    domain("gc @")
    alike(domain)
    assert len(domain.show()["layers"]) == 3
    # After that libvirt does not know the chain's relative names any more.
    domain("delete @ s2 --merge commit")
    alike(domain)
    domain("delete @ s3 --merge pull")
    alike(domain)
    stopped(domain)


def test_it_goes_on_beside_a_tip_with_much_in_it(domain: DomainScene) -> None:
    """Of that only what is written meanwhile is copied, and the tip keeps its path."""
    images.create(domain.disks / "web.qcow2", 64 * MiB)
    domain.define("vda=web.qcow2")
    for number in range(1, 4):
        domain(f"snapshot @ s{number}")
        path, form = domain.source()
        images.io(path, form, f"write -P {48 + number} {number * MiB} {20 * MiB}")
    domain.virsh("start", "@")
    tip = domain.source()[0]
    domain("delete @ s2")
    assert domain.source()[0] == tip
    alike(domain)
    shows = images.read_unlocked([(path, "qcow2") for path in chain_of_snaptree(domain)])
    assert [shows[number * MiB] for number in (1, 2, 3)] == [49, 50, 51]
    stopped(domain)


def test_what_libvirt_is_at_already_is_left_alone(web: DomainScene) -> None:
    web.virsh("start", "@")
    copy = web.disks / "copy.qcow2"
    web.virsh("blockcopy", "@", "vda", copy, "--shallow", "--transient-job")
    assert "libvirt is at work" in web("delete @ s2 --merge reflink", status=BUSY).err
    web.virsh("blockjob", "@", "vda", "--abort")
    copy.unlink()
    web("delete @ s2 --merge reflink")
    alike(web)
    stopped(web)


# ---- killed -------------------------------------------------------------------------------------------------------

TOLD = ("define", "redefine", "forget_record", "cut", "copy", "commit", "pull", "pivot", "abort", "stand_still")


def killed(web: DomainScene, line: str, when: int, *, before: bool, qemu: bool = False) -> str:
    """Run a command; around what it was killed (or QEMU was), empty when it did not come so far."""
    done, told = run_killed(web, line, when, before=before, calls=TOLD, victim=web.folder if qemu else 0)
    assert done.returncode == (-signal.SIGKILL if told and not qemu else 0) or (told and qemu), done.stderr
    return told


def whole(web: DomainScene, before: dict[str, str]) -> None:
    """Everything that has a name shows what it did, while it runs or not."""
    for name in web.names():
        word = web.shows(name)
        assert word == before[name], (name, word)


def recovered(web: DomainScene, before: dict[str, str], *, running: bool) -> None:
    """After a kill: recovery and gc leave nothing, and nothing is lost."""
    whole(web, before)
    web("recover @")
    whole(web, before)
    web("gc @")
    whole(web, before)
    if running:
        alike(web)
        virsh_goes_on(web)
        web.virsh("destroy", "@")
        web("gc @")
    web.forgiven.add("leaks")
    web.sound()
    whole(web, before)
    assert len(web.show()["layers"]) == len(web.names())
    web("snapshot @ afterwards")
    web.virsh("snapshot-delete", "@", "afterwards")


def one(web: DomainScene, gone: str, when: int, *, before: bool, qemu: bool) -> str:
    """One kill, and all that must hold after it."""
    words = {name: web.shows(name) for name in web.names()}
    web.virsh("start", "@")
    told = killed(web, f"delete @ {gone} --merge reflink", when, before=before, qemu=qemu)
    if told and qemu:
        # libvirt may not have seen it yet.
        assert processes_of(web.folder) == []
    recovered(web, words, running=not (told and qemu))
    return told


MOST = 24
"""So many things libvirt is told at the most."""


@pytest.mark.parametrize("qemu", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["snaptree", "qemu"])
@pytest.mark.parametrize("call", ["copy", "pivot"])
def test_killed_around_the_copy(web: DomainScene, call: str, qemu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "TOLD", (call,))
    assert one(web, "s2", 1, before=False, qemu=qemu) == f"killed after {call}"


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("when", range(1, MOST))
@pytest.mark.parametrize("gone", ["s2", "s3", "s1", "s1 s3"])
def test_killed_around_every_call(web: DomainScene, gone: str, when: int, before: bool) -> None:
    one(web, gone, when, before=before, qemu=False)


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("when", range(1, MOST))
@pytest.mark.parametrize("gone", ["s2", "s3"])
def test_qemu_is_killed_around_every_call(web: DomainScene, gone: str, when: int, before: bool) -> None:
    one(web, gone, when, before=before, qemu=True)


def test_what_takes_the_place_of_another_is_locked_before(web: DomainScene, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = durable.exchange, list[str]()

    def exchange(one: str, other: str) -> None:
        require_locked([one, other])
        seen.append(other)
        real(one, other)

    monkeypatch.setattr(durable, "exchange", exchange)
    web.virsh("start", "@")
    web("delete @ s2 --merge reflink")
    assert seen
    whole(web, {"s1": "b.......", "s3": "b12.....", "main": "b123...."})
    stopped(web)


@pytest.mark.mutants
@pytest.mark.slow
def test_qemu_dies_and_the_names_change_only_in_part(web: DomainScene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guest wrote to has its new name last: from that on the merge counts as done."""
    done, exchange, replace = list[str](), durable.exchange, durable.replace

    async def dies(*_: Any) -> None:
        kill_and_wait(web.folder)
        raise ToolError("QEMU has died")

    def once(real: Callable[[str, str], None]) -> Callable[[str, str], None]:
        def changed(one: str, other: str) -> None:
            if done:
                raise IoError("the second of two")
            done.append(other)
            real(one, other)

        return changed

    web.virsh("start", "@")
    with monkeypatch.context() as patched:
        patched.setattr(domain_swap, "_until_ready", dies)
        patched.setattr(durable, "exchange", once(exchange))
        patched.setattr(durable, "replace", once(replace))
        web("delete @ s2 --merge reflink", status=9)
    assert done
    web("recover @")
    web("gc @")
    web.forgiven.add("leaks")
    assert {name: web.shows(name) for name in web.names()} == {"s1": "b.......", "s3": "b12.....", "main": "b123...."}
    web.sound()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_change_of_a_file(web: DomainScene) -> None:
    """Wherever snaptree is killed, recovery leaves the one or the other, whole."""
    web.virsh("start", "@")
    held = {"s1": "b.......", "s3": "b12.....", "main": "b123...."}
    when, done = 1, 0
    with of_libvirt(web.own.uri):
        while killed_at(web, when, f"delete {web.name} s2 --merge reflink"):
            whole(web, {"s2": "b1......", **held})
            web("recover @")
            web("gc @")
            alike(web)
            whole(web, {"s2": "b1......", **held})
            if "s2" not in web.names():
                # Put it back: another one in its place.
                done += 1
                web.virsh("destroy", "@")
                web("revert @ s1 --discard --children --stopped")
                for number in (2, 3):
                    web.write("." * (number - 1) + str(number - 1))
                    web(f"snapshot @ s{number}")
                web.write("...3")
                web.virsh("start", "@")
            when += 5
    assert done >= 1 and when > 40
    stopped(web)


@pytest.mark.mutants
@pytest.mark.slow
@pytest.mark.parametrize("call", ["copy", "pivot"])
def test_it_is_started_anew_before_recovery(web: DomainScene, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU has the merged file open, or the one of before, by the same name: recovery finds out which."""
    monkeypatch.setattr(sys.modules[__name__], "TOLD", (call,))
    words = {name: web.shows(name) for name in web.names()}
    web.virsh("start", "@")
    assert killed(web, "delete @ s2 --merge reflink", 1, before=call == "pivot")
    kill_and_wait(web.folder)
    web.virsh("domstate", "@")
    web.virsh("start", "@")
    recovered(web, words, running=True)


def test_somebody_ends_the_copy(web: DomainScene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "TOLD", ("copy",))
    words = {name: web.shows(name) for name in web.names()}
    web.virsh("start", "@")
    assert killed(web, "delete @ s2 --merge reflink", 1, before=False)
    web.virsh("blockjob", "@", "vda", "--abort")
    recovered(web, words, running=True)


# ---- with a guest that writes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_guest_writes_all_the_while(domain: DomainScene, initramfs: Path) -> None:
    written = Written(domain, initramfs)
    web = written.web
    written.start()
    kept: dict[str, tuple[int, ...]] = {}
    for number in range(1, 6):
        web(f"snapshot @ s{number}")
        kept[f"s{number}"] = written.holds(f"s{number}")
        written.guest.writes_on(100)
    # In the middle, two at once, and at the tip; the root of vdb is raw and stays so.
    for gone in ("s2", "s3 s5", "s4"):
        assert "reflink" in web(f"delete @ {gone} --merge reflink --plan --json").json["way"]
        web(f"delete @ {gone} --merge reflink")
        for name in gone.split():
            del kept[name]
        written.guest.writes_on(50)
        assert {name: written.holds(name) for name in kept} == kept
        alike(web, *DISKS)
    web("delete @ s1")
    written.guest.writes_on(50)
    last = written.guest.hold()
    web.virsh("destroy", "@")
    web("gc @")
    assert min(written.holds("main")) >= written.guest.flushed() and max(written.holds("main")) <= last + 1
    assert web.files() == {"vda.qcow2", "vdb.raw"}
    web.forgiven.add("leaks")
    web.sound()


@pytest.mark.slow
@pytest.mark.parametrize("qemu", [False, True], ids=["snaptree", "qemu"])
@pytest.mark.parametrize(
    ("call", "gone"), [("copy", "s2"), ("pivot", "s2"), ("cut", "s3"), ("copy", "s3"), ("commit", "s3")]
)
def test_killed_while_a_guest_writes(
    domain: DomainScene, initramfs: Path, call: str, gone: str, qemu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Straight over to another tip in the middle of a line; for what is beneath the tip over an overlay, and back."""
    monkeypatch.setattr(sys.modules[__name__], "TOLD", (call,))
    written = Written(domain, initramfs)
    web = written.web
    written.start()
    for number in (1, 2, 3):
        web(f"snapshot @ s{number}")
        written.guest.writes_on(100)
    kept = {name: written.holds(name) for name in ("s1", "s2", "s3") if name != gone}
    flushed = written.guest.flushed()
    assert killed(web, f"delete @ {gone} --merge reflink", 1, before=False, qemu=qemu)
    if not qemu:
        written.guest.writes_on(50)
    web("recover @")
    web("gc @")
    assert {name: written.holds(name) for name in kept} == kept
    if not qemu:
        written.guest.writes_on(50)
        alike(web, *DISKS)
        web.virsh("destroy", "@")
        web("gc @")
    assert min(written.holds("main")) >= max(flushed, written.guest.flushed())
    web.forgiven.add("leaks")
    web.sound()
