"""Transient domains: libvirt has no definition of one and forgets it when it ends. What can be done while it runs is
done without defining it; the rest is refused before anything is touched."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.domain import DomainScene, VirshRefusal, define_text, record_schema
from tests.kit.scene import SLOT, word_of
from tests.kit.told import run_killed

pytestmark = pytest.mark.root
REFUSED = 6
LONG = pytest.mark.slow
ASKED = ("annotate", "redefine", "forget_record", "cut", "commit", "pull", "pivot", "stand_still", "go_on")


@pytest.fixture
def web(domain: DomainScene) -> DomainScene:
    """It runs, on a qcow2 disk that shows ``b.......``."""
    domain.image("web.qcow2", word="b").chmod(0o600)
    create(domain, domain.disks / "web.qcow2")
    return domain


def create(web: DomainScene, *paths: Path) -> None:
    """Have libvirt run it on these disks, the first of which is ``vda``."""
    disks = [(f"vd{'abc'[number]}", path, "qcow2") for number, path in enumerate(paths)]
    (web.folder / "transient.xml").write_text(define_text(web.name, web.uuid, disks))
    web.virsh("create", web.folder / "transient.xml")


def write(web: DomainScene, word: str, disk: str = "vda") -> None:
    """Its QEMU writes, as for its guest; each letter in its slot."""
    device = f"/machine/peripheral/virtio-disk{'abc'.index(disk[-1])}/virtio-backend"
    lines = [f"write -P {ord(each)} {slot * SLOT} {SLOT}" for slot, each in enumerate(word) if each != "."]
    for line in (*lines, "flush"):
        said = web.virsh("qemu-monitor-command", "@", "--hmp", f'qemu-io -d {device} "{line}"')
        assert "rror" not in said, said


def grown(web: DomainScene, *names: str) -> None:
    """snaptree's snapshots in a row, and after each its number in its slot."""
    for name in names:
        web(f"snapshot @ {name}")
        write(web, "." * int(name[-1]) + name[-1])


def agrees(web: DomainScene) -> None:
    """It is transient still, and libvirt and snaptree say the same of it."""
    assert web.virsh("dominfo", "@").split("Persistent:")[1].split()[0] == "no"
    shown = web.show()
    found = web.findings("@")
    assert [each for each in found if each["severity"] == "error" or each["kind"] in ("records", "note")] == []
    tips = dict(line.split(None, 1) for line in web.virsh("domblklist", "@").splitlines())
    assert {each["target"]: each["path"] for each in shown["disks"]} == {
        target: path.strip() for target, path in tips.items()
    }
    listed, schema = web.records(), record_schema()
    names = {each["name"] for each in (*shown["snapshots"], *shown["branches"]) if not each.get("active")}
    assert names <= set(listed) and set(listed) - names <= {"snaptree-placeholder"}
    assert not listed or web.current() is not None
    for name, record in listed.items():
        assert record.findall(".//backingStore") == [], name
        assert schema is None or schema.validate(record), schema.error_log
    assert {key: value for key, value in web.forgotten().items() if key in ("snapshots", "branches")} == {
        key: value for key, value in shown.items() if key in ("snapshots", "branches")
    }


def test_what_virsh_has_made_is_read_and_written_on(web: DomainScene) -> None:
    for name in ("v1", "v2", "v3"):
        web.virsh("snapshot-create-as", "@", name, "--disk-only")
        write(web, "." * int(name[-1]) + name[-1])
    before = web.listed()
    assert web("tree @").status == web("branches @").status == 0
    assert web("delete @ v2 --plan").status == 0 and web.listed() == before
    assert (web.shows("v1"), web.shows("v3"), web.shows()) == ("b.......", "b12.....", "b123....")
    assert any(each["machine"] == web.name for each in web("list --json").json)
    web("verify @ --repair")
    agrees(web)
    web("delete @ v2")
    assert web.listed() == {"v1": None, "v3": "v1"} and len(web.chain()) == 3
    assert (web.shows("v1"), web.shows("v3"), web.shows()) == ("b.......", "b12.....", "b123....")
    agrees(web)
    # virsh goes on from there.
    web.virsh("snapshot-create-as", "@", "v4", "--disk-only")
    web.virsh("snapshot-delete", "@", "v4")
    web.virsh("snapshot-delete", "@", "v3")
    web("verify @ --repair")
    agrees(web)
    assert web.shows() == "b123...."


@pytest.mark.parametrize("way", ["auto", pytest.param("commit", marks=LONG), pytest.param("pull", marks=LONG)])
def test_snapshots_and_deletions(web: DomainScene, way: str) -> None:
    grown(web, "s1", "s2", "s3")
    web("rename @ s3 third")
    web("branch @ other --from s1")
    agrees(web)
    assert web.shows("other") == "b......."
    web("delete @ --branch other")
    web(f"delete @ third --merge {way}")
    agrees(web)
    assert (web.shows("s1"), web.shows("s2"), web.shows()) == ("b.......", "b1......", "b123....")
    write(web, "....4")
    web(f"delete @ s1 s2 --merge {way}")
    agrees(web)
    write(web, ".....5")
    assert web.listed() == {} and web.shows() == "b12345.." and len(web.files()) == 1
    assert web.files() == {"web.qcow2"} or way == "pull"
    web.virsh("destroy", "@")
    assert word_of(images.read(next(web.disks.iterdir()))) == "b12345.."


@LONG
def test_two_disks(domain: DomainScene) -> None:
    web = domain
    create(web, *(web.image(f"{name}.qcow2", word=name[0]) for name in ("web", "data")))
    for name in ("s1", "s2"):
        web(f"snapshot @ {name}")
        write(web, ".1", "vda")
        write(web, "..2", "vdb")
    web("snapshot @ s3 --exclude vdb")
    web("delete @ s1 s2 s3")
    agrees(web)
    write(web, "...3", "vdb")
    assert (web.shows(), web.shows("main", "vdb"), len(web.files())) == ("w1......", "d.23....", 2)


@LONG
def test_memory_and_an_internal_one(web: DomainScene) -> None:
    web("snapshot @ i0 --internal")
    write(web, ".i")
    web("snapshot @ m1 --memory")
    write(web, "..m")
    agrees(web)
    memory = Path(web.names()["m1"]["memory"])
    assert memory.exists() and (web.shows("i0"), web.shows("m1")) == ("b.......", "bi......")
    web("delete @ m1 --memory-only")
    assert not memory.exists() and web.listed() == {"i0": None, "m1": "i0"}
    web("delete @ m1")
    agrees(web)
    web("delete @ i0")
    agrees(web)
    assert web.listed() == {} and web.shows() == "bim....."


def test_what_would_end_it_is_refused(web: DomainScene) -> None:
    grown(web, "s1")
    web("branch @ other --from s1")
    before = web.files(), web.listed(), web.virsh("domid", "@")
    for line in (
        *("revert @ s1", "revert @ s1 --discard --delete", "revert @ s1 --stopped", "switch @ other"),
        *("revert @ s1 --plan", "branch @ third --switch", "branch @ third"),
    ):
        said = web(line, status=REFUSED)
        assert f"domain {web.name} is transient" in said.err and "virsh dumpxml" in said.err, line
    said = web("remove @ --delete-files --yes", status=REFUSED)
    assert "is transient" in said.err and "virsh shutdown" in said.err
    assert (web.files(), web.listed(), web.virsh("domid", "@")) == before
    # As the messages say.
    text = web.virsh("dumpxml", "@", "--inactive", "--security-info")
    web.define_xml(text)
    web("revert @ s1")
    assert web.shows() == "b......." and web.shows("main.1") == "b1......"
    web("delete @ s1")
    web.virsh("destroy", "@")
    web.sound()


@LONG
def test_it_ends_and_is_made_again(web: DomainScene) -> None:
    """libvirt has forgotten its snapshots, as it forgets virsh's; the files are a chain that can be taken over."""
    grown(web, "s1", "s2")
    tip = web.show()["disks"][0]["path"]
    web.virsh("destroy", "@")
    assert "there is no machine" in web("tree @", status=3).err
    create(web, Path(tip))
    assert web.listed() == {} and web.shows() == "b12....." and web.show()["snapshots"] == []
    assert [each["role"] for each in web.show()["layers"]].count("foreign") == 2
    web("set @ --adopt")
    web("squash @ --disk vda")
    agrees(web)
    assert web.shows() == "b12....." and web.files() == {"web.qcow2"}


def ends(web: DomainScene, line: str, when: int, *, before: bool) -> tuple[str, str]:
    """snaptree is killed around the n-th thing that it tells libvirt, the guest writes on if it runs, and it ends.

    Around what that was, and what the guest has seen last.
    """
    done, told = run_killed(web, line, when, before=before, calls=ASKED)
    assert done.returncode == -signal.SIGKILL, done.stderr
    word = "b12....."
    if web.virsh("domstate", "@").strip() == "running":
        write(web, "..z....z")
        word = "b1z....z"
    web.virsh("destroy", "@")
    assert "it had been killed" in web("recover").out
    assert web("recover").out.strip() in ("", "nothing to recover") and not list(web.disks.glob(".*"))
    return told, word


def tip_that_shows(web: DomainScene, word: str) -> Path:
    """The one file on which nothing stands and that shows this."""
    images_there = [path for path in web.disks.iterdir() if path.suffix != ".memory"]
    beneath = {images.info(path).get("full-backing-filename") for path in images_there}
    tips = [path for path in images_there if str(path) not in beneath]
    assert [word_of(images.read(path)) for path in tips] == [word]
    return tips[0]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("line", ["snapshot @ s3", pytest.param("snapshot @ s3 --memory", marks=LONG)])
def test_killed_while_it_is_frozen_and_it_ends(web: DomainScene, line: str, before: bool) -> None:
    """What its guest has written to last is what there is; libvirt cannot say it any more."""
    grown(web, "s1", "s2")
    told, word = ends(web, line, 1, before=before)
    assert told != ""
    tip = tip_that_shows(web, word)
    assert len(web.files()) == (5 if "memory" in line else 3 if before else 4), sorted(web.files())
    create(web, tip)
    assert web.shows() == word


STEPS = {"delete @ s2 --merge commit": 9, "delete @ s2 --merge pull": 6, "delete @ s1 --merge commit": 5}


@pytest.mark.parametrize("before", [pytest.param(True, marks=LONG), False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("line", "when"),
    [
        pytest.param(line, number, marks=[] if (line, number) == ("delete @ s2 --merge commit", 7) else LONG)
        for line, last in STEPS.items()
        for number in range(1, last + 1)
    ],
)
def test_killed_while_it_is_merged_and_it_ends(web: DomainScene, line: str, when: int, before: bool) -> None:
    """Before or after its guest has gone over to another file."""
    grown(web, "s1", "s2")
    told, word = ends(web, line, when, before=before)
    assert told
    tip = tip_that_shows(web, word)
    create(web, tip)
    assert web.shows() == word


@pytest.mark.mutants
@LONG
@pytest.mark.parametrize(("when", "before"), [(5, False), (6, False), (7, True)], ids=["stands", "over", "noted"])
def test_killed_while_it_stands_still(web: DomainScene, when: int, before: bool) -> None:
    """Its guest goes on, in the one file or in the other."""
    grown(web, "s1", "s2")
    done, told = run_killed(web, "delete @ s2 --merge commit", when, before=before, calls=ASKED)
    assert done.returncode == -signal.SIGKILL and told, done.stderr
    assert web.virsh("domstate", "@").strip() == "paused"
    assert "it had been killed" in web("recover @").out
    assert web.virsh("domstate", "@").strip() == "running"
    write(web, "..z....z")
    web("gc @")
    agrees(web)
    assert (web.shows("s1"), web.shows(), len(web.chain())) == ("b.......", "b1z....z", 2)
    web.virsh("destroy", "@")
    assert tip_that_shows(web, "b1z....z").name == "web.s1.qcow2"


@LONG
def test_libvirt_has_lost_it(web: DomainScene) -> None:
    """libvirt 11.3 keeps it, off, when going back to a snapshot has failed half-way, and does not start it again."""
    web.virsh("snapshot-create-as", "@", "v1", "--disk-only")
    # It names its overlays by the second.
    with pytest.raises(VirshRefusal, match="already exists"):
        for _ in range(8):
            web.virsh("snapshot-revert", "@", "v1", "--running")
    assert not web.runs()
    said = web("snapshot @ s1", status=REFUSED)
    assert "is transient and off" in said.err and "virsh define" in said.err
    web.define_xml(web.virsh("dumpxml", "@", "--inactive", "--security-info"))
    web("snapshot @ s1")
    assert set(web.listed()) == {"v1", "s1"}
    web.virsh("start", "@")
