"""Memory of a domain: saved with its disks, gone back to, parked with branches; libvirt's records and files with it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.domain import DomainScene, domain_scene, goes_on, of_libvirt, refused

from snaptree.errors import BusyError
from snaptree.machines.connection import Connection
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.plan import Plan

pytestmark = pytest.mark.root
USAGE, BUSY, REFUSED, UNHEALTHY, NO_SPACE = 2, 5, 6, 7, 8


def memory_of(web: DomainScene, name: str) -> Path:
    """The file with the memory of a snapshot or a branch."""
    return Path(web.names()[name]["memory"])


def is_off(web: DomainScene) -> None:
    """Turn it off, and see that all is whole."""
    web.virsh("destroy", "@")
    web.sound()


def remembered(web: DomainScene) -> None:
    """It runs, with the memory snapshot ``m1`` on ``s1``."""
    web("snapshot @ s1")
    web.write(".1")
    web.virsh("start", "@")
    web("snapshot @ m1 --memory")


def test_a_memory_snapshot_is_as_virsh_has_it(web: DomainScene) -> None:
    remembered(web)
    assert web.show()["state"] == "running" and web.current() == "m1" and web.listed() == {"s1": None, "m1": "s1"}
    record, memory = web.record("m1"), memory_of(web, "m1")
    assert record.findtext("state") == "running" and record.find("memory").get("snapshot") == "external"
    assert record.find("memory").get("file") == str(memory) and memory.parent == web.disks
    assert web.names()["m1"]["consistency"] == "memory" and stat.S_IMODE(memory.stat().st_mode) == 0o600
    assert record.find("cookie") is not None
    web.agree()
    # virsh goes back to it as to one of its own, and it runs then.
    web.virsh("snapshot-revert", "@", "m1")
    assert web.virsh("domstate", "@").strip() == "running" and web.shows("m1") == "b1......"
    web("snapshot @ m2 --memory --memory-file elsewhere")
    assert memory_of(web, "m2") == web.disks / "elsewhere"
    web("delete @ m1")
    assert not memory.exists()
    web.agree()
    web.virsh("snapshot-delete", "@", "m2")
    assert not (web.disks / "elsewhere").exists()
    web.virsh("destroy", "@")
    web("verify @ --repair")
    web.sound()


@pytest.mark.slow
def test_going_back_to_memory_with_the_domain_off(web: DomainScene) -> None:
    remembered(web)
    web.virsh("destroy", "@")
    web.write("..2")
    web("revert @ m1")
    assert web.show()["state"] == "running" and memory_of(web, "m1").exists()
    assert web.shows("main") == "b1......" and web.shows("main.1") == "b12....."
    assert web.names()["main.1"]["memory"] is None
    web.agree()
    is_off(web)
    web("revert @ m1 --paused")
    assert web.show()["state"] == "paused"
    web.virsh("destroy", "@")
    web("revert @ m1 --stopped")
    assert web.show()["state"] == "off"
    web.sound()
    # On the very tip that it has already.
    tip = web.source()
    web("revert @ m1")
    assert web.show()["state"] == "running" and web.source() == tip
    web.virsh("destroy", "@")
    web("revert @ m1 --no-memory --running")
    web.agree()
    is_off(web)


def test_going_to_and_fro_with_memory_while_it_runs(web: DomainScene) -> None:
    remembered(web)
    web("revert @ m1")
    parked = memory_of(web, "main.1")
    assert web.show()["state"] == "running" and parked.exists() and parked != memory_of(web, "m1")
    record = web.record("main.1")
    assert record.findtext("state") == "running" and record.find("memory").get("file") == str(parked)
    assert web.listed() == {"s1": None, "m1": "s1", "main.1": "m1"} and web.current() == "m1"
    web.agree()
    web("switch @ main.1")
    # The memory of what is worked on is nobody's.
    assert not parked.exists() and web.show()["active_branch"] == "main.1" and memory_of(web, "main").exists()
    assert web.listed() == {"s1": None, "m1": "s1", "main": "m1"}
    web.agree()
    web("switch @ main --paused")
    assert web.show()["state"] == "paused" and memory_of(web, "main.1").exists()
    web.agree()
    web("switch @ main.1 --no-memory")
    assert web.names()["main"]["memory"] is None
    web.virsh("destroy", "@")
    web("delete @ --branch main")
    web("delete @ m1")
    assert not [path for path in web.disks.iterdir() if path.suffix == ".memory"]
    web.sound()


def test_what_is_not_wanted_goes(web: DomainScene) -> None:
    remembered(web)
    said = web("revert @ m1 --discard --delete")
    assert "goes on from the instant" in said.out and web.show()["state"] == "running"
    assert web.listed() == {"s1": None} and set(web.names()) == {"s1", "main"}
    web.agree()
    assert web.shows("main") == "b1......" and len(web.show()["layers"]) == 2
    is_off(web)
    assert web.files() == {each["path"].rsplit("/", 1)[1] for each in web.show()["layers"]}
    goes_on(web, "s1")


@pytest.mark.slow
def test_memory_of_now_goes_with_what_has_none(web: DomainScene) -> None:
    remembered(web)
    web("revert @ s1 --memory")
    assert web.show()["state"] == "running" and memory_of(web, "main.1").exists()
    assert web.shows("main") == "b......."
    web.agree()
    web("switch @ main.1 --no-memory --stopped")
    assert web.show()["state"] == "off" and web.shows("main.1") == "b1......"
    web.sound()
    web("switch @ main")
    assert web.show()["state"] == "off"
    web.virsh("start", "@")
    web("revert @ m1 --stopped")
    assert web.show()["state"] == "off" and memory_of(web, "main.2").exists()
    web.sound()
    web("switch @ main.2")
    assert web.show()["state"] == "running"
    is_off(web)


def test_a_memory_that_several_have(web: DomainScene) -> None:
    remembered(web)
    memory = memory_of(web, "m1")
    web("branch @ other --from m1")
    assert memory_of(web, "other") == memory
    assert web.record("other").find("memory").get("file") == str(memory)
    assert web.record("other").findtext("state") == "running"
    web.agree()
    # virsh would unlink the file with the first of them.
    for name in ("other", "m1"):
        assert refused(web, "snapshot-delete", "@", name) and memory.exists()
    web("delete @ m1")
    assert memory.exists() and memory_of(web, "other") == memory
    web.agree()
    web("switch @ other")
    assert not memory.exists() and web.shows("other") == "b1......" and web.show()["state"] == "running"
    web.agree()
    is_off(web)
    # virsh goes back to what is parked with memory.
    web.virsh("snapshot-revert", "@", "main")
    assert web.virsh("domstate", "@").strip() == "running" and web.shows("main") == "b1......"
    web("snapshot @ again")
    web.agree()
    web.virsh("destroy", "@")


def test_only_the_memory_goes(web: DomainScene) -> None:
    remembered(web)
    memory = memory_of(web, "m1")
    web("delete @ m1 --memory-only")
    assert not memory.exists() and web.names()["m1"]["memory"] is None
    assert web.record("m1").findtext("state") == "disk-snapshot"
    web.agree()
    is_off(web)
    goes_on(web, "m1")


@pytest.mark.slow
def test_two_disks_with_names_of_ones_own(domain: DomainScene) -> None:
    web = domain
    web.define("vda=web.qcow2", "vdb=data.raw")
    web.virsh("start", "@", "--paused")
    assert "which would be newer" in web("snapshot @ m1 --memory --exclude vdb", status=REFUSED).err
    web(f"snapshot @ m1 --memory --file vdb={web.disks}/mine.qcow2 --description 'a text'")
    assert web.path("main", "vdb") == web.disks / "mine.qcow2" and web.record("m1").findtext("description") == "a text"
    assert web.record("m1").findtext("state") == "paused"
    web.agree()
    # QEMU saves it once only before it has run.
    said = web("revert @ m1", status=REFUSED)
    assert "run for a moment" in said.err and web.show()["state"] == "paused" and set(web.names()) == {"m1", "main"}
    web.agree()
    web.virsh("resume", "@")
    web.virsh("suspend", "@")
    web(f"revert @ m1 --keep-as kept --file vda={web.disks}/again.qcow2")
    assert web.show()["state"] == "paused" and web.path("main") == web.disks / "again.qcow2"
    assert memory_of(web, "kept").exists()
    web.agree()
    is_off(web)
    web("delete @ --branch kept")
    web("delete @ m1")
    assert web.files() == {"web.qcow2", "data.raw"}
    web.sound()


@pytest.mark.slow
def test_what_virsh_has_saved_is_loaded(web: DomainScene) -> None:
    web.virsh("start", "@")
    web.virsh("snapshot-create-as", "@", "m1", "--memspec", f"file={web.disks}/m1.saved,snapshot=external")
    web.virsh("snapshot-create-as", "@", "s2", "--disk-only")
    web("revert @ m1")
    assert web.show()["state"] == "running" and web.listed() == {"m1": None, "s2": "m1", "main.1": "s2"}
    web.agree()
    web("switch @ main.1")
    web.agree()
    is_off(web)


@pytest.mark.slow
def test_it_is_off_or_not_possible(web: DomainScene) -> None:
    assert "is off, and has no memory" in web("snapshot @ m1 --memory", status=REFUSED).err
    assert "none is saved" in web("snapshot @ m1 --memory-file /tmp/x", status=USAGE).err
    web.virsh("start", "@")
    assert "of one instant" in web("snapshot @ m1 --memory --quiesce", status=USAGE).err
    web("snapshot @ m1 --memory")
    web.virsh("managedsave", "@")
    for line in ("snapshot @ m2 --memory", "revert @ m1"):
        assert "managed save" in web(line, status=REFUSED).err
    web.virsh("managedsave-remove", "@")
    web.sound()


@pytest.fixture
def loaded(web: DomainScene) -> DomainScene:
    """It runs, and ``m1`` has a memory."""
    remembered(web)
    return web


def still_runs(web: DomainScene, since: str) -> None:
    """Nothing has been touched."""
    assert web.show()["state"] == "running" and web.virsh("domid", "@") == since
    web.agree()


@pytest.mark.slow
def test_a_memory_file_that_is_not_what_it_was(loaded: DomainScene) -> None:
    web, memory = loaded, memory_of(loaded, "m1")
    number, kept = web.virsh("domid", "@"), web.folder / "kept"
    shutil.copy2(memory, kept)

    def refuses(what: str) -> None:
        said = web("revert @ m1", status=UNHEALTHY)
        assert what in said.err and "--no-memory" in said.err
        assert web.virsh("domid", "@") == number and web.show()["state"] == "running"

    os.truncate(memory, memory.stat().st_size - 1000)
    refuses("is cut")
    memory.unlink()
    refuses("is not there")
    memory.write_bytes(b"something else" * 1000)
    refuses("is cut")
    memory.write_bytes(bytes(kept.stat().st_size))
    refuses("is not the one")
    shutil.copy2(kept, memory)
    still_runs(web, number)
    web("revert @ m1 --discard")
    assert web.show()["state"] == "running"
    web.agree()
    is_off(web)


def test_a_cut_file_of_which_nothing_is_remembered(web: DomainScene) -> None:
    web.virsh("start", "@")
    memory = web.disks / "m1.saved"
    web.virsh("snapshot-create-as", "@", "m1", "--memspec", f"file={memory},snapshot=external")
    number = web.virsh("domid", "@")
    whole = memory.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 5000, 50, 0):
        memory.write_bytes(whole[:size])
        assert "is cut" in web("revert @ m1", status=UNHEALTHY).err
        assert web.virsh("domid", "@") == number
    memory.write_bytes(whole.replace(b"LibvirtQemudSave", b"LibvirtQemudPart", 1))
    assert "never written to its end" in web("revert @ m1", status=UNHEALTHY).err
    memory.write_bytes(b"nothing of libvirt's" + whole[20:])
    assert "no memory that libvirt has saved" in web("revert @ m1", status=UNHEALTHY).err
    memory.write_bytes(whole)
    web("revert @ m1")
    assert web.show()["state"] == "running"
    web.agree()
    is_off(web)


@pytest.mark.slow
def test_the_memory_of_another(web: DomainScene) -> None:
    with domain_scene(web.own) as other:
        other.define("vda=other.qcow2")
        other.virsh("start", "@")
        other.virsh("snapshot-create-as", "@", "m1", "--memspec", f"file={other.disks}/m1.saved,snapshot=external")
        web.virsh("start", "@")
        web.virsh("snapshot-create-as", "@", "m1", "--memspec", f"file={web.disks}/m1.saved,snapshot=external")
        shutil.copy(other.disks / "m1.saved", web.disks / "m1.saved")
    number = web.virsh("domid", "@")
    assert "memory of another domain" in web("revert @ m1", status=REFUSED).err
    assert web.virsh("domid", "@") == number
    web.virsh("destroy", "@")


@pytest.mark.slow
def test_other_disks_than_then(loaded: DomainScene) -> None:
    web = loaded
    images.create(web.disks / "more.qcow2", 1 << 20)
    web.virsh("attach-disk", "@", web.disks / "more.qcow2", "vdb", "--subdriver", "qcow2", "--config")
    web.virsh("destroy", "@")
    assert "vdb" in web("revert @ m1", status=REFUSED).err
    web("snapshot @ both")
    web.virsh("detach-disk", "@", "vdb", "--config")
    web("revert @ m1")
    assert web.show()["state"] == "running"
    web.virsh("destroy", "@")


@pytest.mark.slow
def test_a_definition_that_was_changed_since(loaded: DomainScene) -> None:
    """It goes on as it was then, and is what it was made since when it is started the next time."""
    web = loaded
    web.virsh("setmaxmem", "@", "96M", "--config")
    web.virsh("setmem", "@", "96M", "--config")
    web("revert @ m1")
    assert web.show()["state"] == "running"
    assert "<memory unit='KiB'>65536<" in web.virsh("dumpxml", "@")
    assert "<memory unit='KiB'>98304<" in web.virsh("dumpxml", "@", "--inactive")
    web.agree()
    is_off(web)


@pytest.fixture
def small(web: DomainScene) -> Iterator[Path]:
    """A file system with little room."""
    place = web.folder / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200M", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_no_room(web: DomainScene, small: Path) -> None:
    web.virsh("start", "@")
    (small / "filler").write_bytes(bytes(150 << 20))
    assert "there is" in web(f"snapshot @ m1 --memory --memory-file {small}/m1", status=NO_SPACE).err
    assert set(web.names()) == {"main"} and web.show()["state"] == "running"
    web.virsh("destroy", "@")


@pytest.mark.mutants
@pytest.mark.slow
@pytest.mark.parametrize("variables", [False, True])
def test_libvirt_writes_the_memory_elsewhere(web: DomainScene, small: Path, *, variables: bool) -> None:
    """It does not see what was mounted there since it was started: the snapshot is not taken, the guest goes on."""
    if variables:
        with_variables(web)
    web.virsh("start", "@")
    said = web(f"snapshot @ m1 --memory --memory-file {small}/m1", status=UNHEALTHY)
    assert "is cut" in said.err and web.show()["state"] == "running" and set(web.names()) == {"main"}
    assert web.listed() == {} and not (small / "m1").exists()
    assert not [path for path in (web.state / "firmware").rglob("*") if path.is_file()]
    web.agree()
    web.virsh("destroy", "@")
    web("gc @")
    assert web.files() == {"web.qcow2"}
    web.sound()


def test_libvirt_fails_to_save(web: DomainScene) -> None:
    """The guest goes on in its tips, and nothing is left."""
    web.virsh("start", "@")
    files = web.files()

    def confirm(plan: Plan) -> bool:
        # Somebody has begun something else since it was planned.
        web.virsh("blockcopy", "@", "vda", "--dest", web.folder / "copy.qcow2", "--transient-job", "--bandwidth", "1")
        return True

    with of_libvirt(web.own.uri), pytest.raises(BusyError, match="save the memory"):
        Connection(str(web.state)).machine(web.name).run(SnapshotRequest("m1", memory=True), confirm=confirm)
    assert web.files() == files and web.show()["state"] == "running" and set(web.names()) == {"main"}
    assert "is at work" in web("snapshot @ m1 --memory", status=BUSY).err
    web.virsh("blockjob", "@", "vda", "--abort")
    web("snapshot @ m1 --memory")
    web.agree()
    is_off(web)


def with_variables(web: DomainScene) -> Path:
    """It has UEFI variables, which begin with ``one``; their file."""
    loader, variables = web.folder / "code.fd", web.folder / "vars.fd"
    loader.write_bytes(bytes(65536))
    variables.write_bytes(b"one" + bytes(65533))
    web.define("vda=web.qcow2", more="<features><acpi/></features>")
    text = (web.folder / "domain.xml").read_text()
    firmware = f"<loader readonly='yes' type='pflash'>{loader}</loader><nvram>{variables}</nvram></os>"
    web.define_xml(text.replace("</os>", firmware))
    return variables


def test_uefi_variables_are_of_the_instant(domain: DomainScene) -> None:
    web, variables = domain, with_variables(domain)
    web.virsh("start", "@")
    web("snapshot @ m1 --memory")
    web("snapshot @ s2")
    web.virsh("destroy", "@")
    variables.write_bytes(b"two" + bytes(65533))
    web("revert @ m1")
    assert variables.read_bytes()[:3] == b"one" and web.show()["state"] == "running"
    web.agree()
    web("switch @ main.1 --stopped")
    assert variables.read_bytes()[:3] == b"two"
    web("revert @ m1 --no-memory")
    assert variables.read_bytes()[:3] == b"one"
    web.sound()
