"""Internal snapshots of a domain that runs: libvirt takes and deletes them, with the memory, on all disks at once."""

from __future__ import annotations

import json
import signal

import pytest
from tests.kit import images
from tests.kit.domain import DomainScene
from tests.kit.told import run_killed

from snaptree.images.facts import read_facts

pytestmark = pytest.mark.root
REFUSED = 6


def tags(web: DomainScene, name: str = "main", disk: str = "vda") -> list[str]:
    """The internal snapshots in the file of a name."""
    said = images.run("qemu-img", "info", "-U", "-f", "qcow2", "--output=json", web.path(name, disk))
    return [each["name"] for each in json.loads(said).get("snapshots", [])]


def test_they_are_taken_and_deleted_while_it_runs(domain: DomainScene) -> None:
    web = domain
    web.define("vda=web.qcow2", "vdb=data.qcow2")
    web.virsh("start", "@")
    for name in ("i1", "i2", "i3"):
        said = web(f"snapshot @ {name} --internal")
        assert "saves the memory with it" in said.out
    assert web.listed() == {"i1": None, "i2": "i1", "i3": "i2"} and web.current() == "i3"
    assert web.names()["i1"]["consistency"] == "memory" and web.show()["snapshots"][0]["kind"] == "internal"
    assert (
        web.record("i2").find("memory").get("snapshot") == "internal"
        and web.record("i2").findtext("state") == "running"
    )
    assert tags(web) == ["i1", "i2", "i3"] == tags(web, disk="vdb")
    web.agree()
    web("delete @ i2")
    assert tags(web) == ["i1", "i3"] == tags(web, disk="vdb") and web.listed() == {"i1": None, "i3": "i1"}
    web.agree()
    # virsh goes back to one, with its memory; and an external one is taken above.
    web.virsh("snapshot-revert", "@", "i1")
    assert web.virsh("domstate", "@").strip() == "running"
    web("verify @ --repair")
    web("snapshot @ s4")
    web.agree()
    assert "until the domain is off" in web("delete @ i3").out and "i3" not in web.listed()
    web.virsh("destroy", "@")
    web("gc @")
    for name in ("web.qcow2", "data.qcow2"):
        assert [each.name for each in read_facts(str(web.disks / name), "qcow2").internals] == ["i1"]
    web.sound()
    assert web.listed() == {"i1": None, "s4": "i1"}


def test_a_name_goes_and_what_it_named_stays(web: DomainScene) -> None:
    web("snapshot @ i1 --internal")
    web.write(".1")
    web("snapshot @ i2 --internal")
    web.virsh("start", "@")
    assert "goes on calling it 'i1'" in web("rename @ i1 first").out
    assert tags(web) == ["i1", "i2"] and web.listed() == {"first": None, "i2": "first"}
    assert web.shows("first") == "b......." and web.shows("i2") == "b1......"
    web("branch @ side --from i2")
    web("delete @ i2 --merge none")
    assert web.shows("side") == "b1......"
    web.agree()
    web.virsh("destroy", "@")
    web("gc @")
    assert web.shows("first") == "b......." and web.shows("side") == "b1......"
    web.sound()


@pytest.mark.slow
def test_what_libvirt_does_not_take(domain: DomainScene) -> None:
    web = domain
    web.define("vda=web.qcow2", "vdb=data.raw")
    web.virsh("start", "@")
    assert "vdb is raw" in web("snapshot @ i1 --internal", status=REFUSED).err
    assert "has no record" in web("snapshot @ i1 --internal --exclude vdb", status=REFUSED).err
    assert "within them" in web(f"snapshot @ i1 --internal --file vda={web.disks}/x.qcow2", status=REFUSED).err
    web.virsh("destroy", "@")
    assert "has no record" in web("snapshot @ i1 --internal --exclude vdb", status=REFUSED).err
    web("snapshot @ i1 --internal")
    web.sound()


def test_going_back_loads_the_memory(web: DomainScene) -> None:
    web.virsh("start", "@")
    web("snapshot @ i1 --internal")
    web.virsh("setmaxmem", "@", "96M", "--config")
    web("revert @ i1")
    assert web.show()["state"] == "running" and web.shows("main") == "b......." and tags(web) == ["i1", "main.1"]
    # It is what it was then until it is switched off.
    assert "<memory unit='KiB'>65536<" in web.virsh("dumpxml", "@")
    assert "<memory unit='KiB'>98304<" in web.virsh("dumpxml", "@", "--inactive")
    web.agree()
    web.virsh("destroy", "@")
    web.write(".1")
    said = web("revert @ i1 --discard")
    assert "from the memory of 'i1'" in said.out and web.show()["state"] == "running"
    assert web.shows("main") == "b......."
    web.agree()
    web("revert @ i1 --stopped")
    assert web.show()["state"] == "off"
    web.sound()
    web("revert @ i1 --no-memory --running")
    # Below an overlay it is not loaded.
    web("snapshot @ s2")
    said = web("revert @ i1")
    assert "from the memory" not in said.out and web.show()["state"] == "running"
    web.agree()
    web.virsh("destroy", "@")
    web.sound()


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("line", "what"), [("snapshot @ i2 --internal", "mark"), ("delete @ i1", "delete_snapshot")])
@pytest.mark.parametrize("destroyed", [False, True], ids=["runs-on", "destroyed"])
def test_killed(web: DomainScene, line: str, what: str, before: bool, destroyed: bool) -> None:
    web.virsh("start", "@")
    web("snapshot @ i1 --internal")
    done, _ = run_killed(web, line, 1, before=before, calls=(), memory_calls=(what,))
    assert done.returncode == -signal.SIGKILL
    if destroyed:
        web.virsh("destroy", "@")
    web("recover @")
    web.agree()
    expected = {"i1", "main"} if what == "mark" else {"main"}
    assert set(web.names()) == (expected | {"i2"} if what == "mark" and not before else expected)
    assert set(tags(web)) == set(web.names()) - {"main"}
    if not destroyed:
        web.virsh("destroy", "@")
    web.sound()


@pytest.mark.parametrize(
    ("call", "before"),
    [
        ("load_within", False),
        pytest.param("load_within", True, marks=pytest.mark.slow),
        pytest.param("define", True, marks=pytest.mark.slow),
        pytest.param("define", False, marks=pytest.mark.slow),
    ],
    ids=["loaded", "not-loaded", "not-defined", "defined"],
)
def test_killed_when_the_memory_is_loaded(web: DomainScene, call: str, before: bool) -> None:
    """libvirt has put the definition of then in the place of that of now."""
    web.virsh("start", "@")
    web("snapshot @ i1 --internal")
    web("snapshot @ s2")
    web("delete @ s2")
    web.virsh("setmaxmem", "@", "96M", "--config")
    web.virsh("desc", "@", "--config", "what it is for")
    calls, memory_calls = (("define",), ()) if call == "define" else ((), ("load_within",))
    done, told = run_killed(web, "revert @ i1", 1, before=before, calls=calls, memory_calls=memory_calls)
    assert done.returncode == -signal.SIGKILL and told, done.stderr
    was = web.virsh("dumpxml", "@", "--inactive")
    assert ("98304" in was) == (told in ("killed before load_within", "killed after define"))
    web("recover @")
    now = web.virsh("dumpxml", "@", "--inactive")
    assert "<memory unit='KiB'>98304<" in now and "what it is for" in now
    assert web.show()["state"] == "running" and set(web.names()) == {"i1", "main", "main.1"}
    web.agree()
    web.virsh("destroy", "@")
    web.sound()
