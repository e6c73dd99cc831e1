"""A domain is a machine without being added: its tree is that of libvirt's records, by the images' headers."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from tests.kit import images, scene
from tests.kit.domain import URI, DomainScene, grown, of_libvirt
from tests.kit.scene import SLOT, SLOTS, command

pytestmark = pytest.mark.root
NOT_FOUND, REFUSED, TOOL = 3, 6, 12


def test_what_virsh_made_is_shown_without_being_added(web: DomainScene) -> None:
    grown(web, "s1", "s2", "s3")
    web.virsh("snapshot-revert", "@", "s1")
    web.write(".......x")
    grown(web, "s4")
    before = {path: path.read_bytes() for path in web.disks.iterdir()}, web.listed()
    shown = web.show()
    assert shown["provider"] == "libvirt" and shown["state"] == "off" and shown["active_branch"] == "main"
    assert {each["name"]: each["parent"] for each in shown["snapshots"]} == {
        "s1": None, "s2": "s1", "s3": "s2", "s4": "s1",
    }  # fmt: skip
    assert [each["parent"] for each in shown["branches"]] == ["s4"]
    assert [web.shows(each) for each in ("s1", "s2", "s3", "s4", "main")] == [
        "b.......", "b1......", "b12.....", "b......x", "b...4..x",
    ]  # fmt: skip
    assert all(each["owned"] for each in shown["layers"])
    assert "you are here" in web("tree @").out and "s4" in web("branches @").out
    assert web("path @").out.strip() == str(web.source()[0])
    assert web("log @ --json").json == []
    assert web(f"show {web.uuid} --json").json == shown
    rows = [each for each in web("list --json").json if each["machine"] == web.name]
    assert rows == [
        {
            "machine": web.name, "provider": "libvirt", "disks": ["vda"], "snapshots": 4, "branches": 1,
            "active_branch": "main", "pending": [],
        }
    ]  # fmt: skip
    assert "domainsnapshot" in web("show @ --xml s2").out
    # Looking has changed nothing, and nothing is remembered of it.
    assert ({path: path.read_bytes() for path in web.disks.iterdir()}, web.listed()) == before
    assert not web.state.exists()


def test_the_headers_say_what_stands_on_what(web: DomainScene) -> None:
    grown(web, "s1", "s2", "s3")
    # A metadata-only deletion: what it had is beneath what stays.
    web.virsh("snapshot-delete", "@", "s2", "--metadata")
    assert {each["name"]: each["parent"] for each in web.show()["snapshots"]} == {"s1": None, "s3": "s1"}
    assert web.shows("s3") == "b12....." and [each["role"] for each in web.show()["layers"]].count("loose") == 1
    # "Current" is moved to where the disks are not: they are where they were.
    web.virsh("snapshot-current", "@", "s1")
    assert web.names()["main"]["parent"] == "s3"
    assert "libvirt takes 's1' for the current snapshot" in web("show @").out
    # A hand-made overlay that nobody knows.
    images.create(web.disks / "mine.qcow2", SLOTS * SLOT, backing=(web.path("s3"), "qcow2"))
    found = web.findings("@")
    assert any(each["kind"] == "outsider" and "mine.qcow2" in each["detail"] for each in found)


def test_nothing_is_current(web: DomainScene) -> None:
    grown(web, "s1", "s2")
    # Dropping the record that is current, and the root, leaves none.
    web.virsh("snapshot-revert", "@", "s1")
    web.virsh("snapshot-delete", "@", "s1", "--metadata")
    assert web.current() is None and web.listed() == {"s2": None}
    assert web.names()["main"]["parent"] is None and web.shows("s2") == "b1......"
    assert web.shows() == "b......."
    web("verify @ --repair")
    assert web.current() == "snaptree-placeholder"
    web.sound()


@pytest.mark.slow
def test_what_a_running_domain_has_merged(web: DomainScene) -> None:
    grown(web, "s1", "s2", "s3")
    web.virsh("start", "@", "--paused")
    shown = web.show()
    assert shown["state"] == "paused" and [each["parent"] for each in shown["branches"]] == ["s3"]
    base, top = str(web.path("s1")), str(web.path("s3"))

    def beneath(path: str) -> str | None:
        return str(next(each["parent"] for each in web.show()["layers"] if each["path"] == path))

    tip = str(web.source()[0])
    assert beneath(tip) == top
    web.virsh("blockcommit", "@", "vda", "--base", base, "--top", top, "--wait")
    assert beneath(tip) == base and web.names()["main"]["parent"] == "s1"
    web.virsh("blockpull", "@", "vda", "--wait")
    assert beneath(tip) == "None" and web.names()["main"]["parent"] == "s3"
    web("snapshot @ s9")
    web("rename @ s3 third")
    assert set(web.listed()) == {"s1", "s2", "third", "s9"}
    web.virsh("destroy", "@")
    assert web.shows() == web.shows("s9") == "b123...."
    web.sound()


def test_disks_that_are_left_alone(domain: DomainScene) -> None:
    images.create(domain.disks / "iso.raw", 1 << 20, "raw")
    images.create(domain.disks / "template.qcow2", SLOTS * SLOT)
    others = "".join(
        [
            f"<disk type='file' device='cdrom'><source file='{domain.disks}/iso.raw'/><target dev='sda' bus='sata'/>"
            "<readonly/></disk>",
            f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{domain.disks}/iso.raw'/>"
            "<target dev='vdc' bus='virtio'/><readonly/></disk>",
            f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{domain.disks}/iso.raw'/>"
            "<target dev='vdd' bus='virtio'/><shareable/></disk>",
            "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='x'>"
            "<host name='127.0.0.1' port='10809'/></source><target dev='vde' bus='virtio'/></disk>",
        ]
    )
    domain.define("vda=web.qcow2", "vdb=data.raw", devices=others)
    shown = domain.show()
    assert [each["target"] for each in shown["disks"]] == ["vda", "vdb"]
    said = " ".join(shown["notes"])
    assert "sda is left alone: it is a CD-ROM" in said and "vdc is left alone: it is read-only" in said
    assert "vdd is left alone: other machines share it" in said and "vde is left alone: it is on network" in said
    domain("snapshot @ s1")
    kinds = {each.get("name"): each.get("snapshot") for each in domain.record("s1").findall("disks/disk")}
    assert kinds == {"vda": "external", "vdb": "external", "sda": "no", "vdc": "no", "vdd": "no", "vde": "no"}
    domain.write("x", "vdb")
    domain("revert @ s1")
    assert domain.shows("main.1", "vdb") == "x......." and domain.shows("main", "vdb") == "........"
    left = {each.find("target").get("dev") for each in domain.definition().findall("devices/disk")}
    assert left == {"vda", "vdb", "sda", "vdc", "vdd", "vde"}
    domain("delete @ --branch main.1")
    domain("delete @ s1")
    assert domain.files() == {"web.qcow2", "data.raw", "iso.raw", "template.qcow2"}


def test_a_golden_image_and_another_domain_on_it(domain: DomainScene) -> None:
    golden = domain.image("golden.qcow2", word="g")
    images.create(domain.disks / "web.qcow2", SLOTS * SLOT, backing=(golden, "qcow2"))
    domain.define("vda=web.qcow2")
    domain("snapshot @ s1")
    before = golden.read_bytes()
    assert {each["path"]: each["owned"] for each in domain.show()["layers"]}[str(golden)] is False
    # Another domain stands on what is the snapshot's alone here: it is not to change, whoever deletes the name.
    clone = images.create(domain.folder / "clone.qcow2", SLOTS * SLOT, backing=(domain.path("s1"), "qcow2"))
    other = DomainScene.__new__(DomainScene)
    other.__dict__.update(domain.__dict__, name=f"{domain.name}-clone", uuid="8c3e2a3c-7f0b-4c4b-9a70-0f2a1f0b7d11")
    text = (domain.folder / "domain.xml").read_text()
    text = text.replace(domain.name, other.name).replace(domain.uuid, other.uuid)
    other.define_xml(text.replace(f"{domain.disks}/web.qcow2", str(clone)))
    try:
        domain.write(".1")
        held = domain.path("s1").read_bytes()
        domain("delete @ s1")
        found = domain.findings("@")
        assert [each["detail"] for each in found if each["kind"] == "outsider" and "-clone'" in each["detail"]]
        assert (domain.disks / "web.qcow2").read_bytes() == held and domain.shows() == "g1......"
    finally:
        other.remove()
    domain("gc @")
    assert domain.files() == {"golden.qcow2", "web.qcow2"} and golden.read_bytes() == before
    assert domain.shows() == "g1......"


def lxc(web: DomainScene) -> tuple[str, int, str]:
    """The same daemon's containers, and what is said of them: most have libvirt without that driver."""
    uri = web.own.uri.replace("qemu+unix", "lxc+unix")
    there = subprocess.run(["virsh", "-c", uri, "uri"], capture_output=True, check=False).returncode == 0
    if there:
        return uri, REFUSED, "not QEMU's: its driver is LXC"
    return uri, TOOL, "no connection driver available for lxc:///system\n  hint: is the name right? 'virsh -c URI list'"


def test_no_such_domain_no_libvirt_no_driver_of_ours(web: DomainScene, tmp_path: Path) -> None:
    said = web("tree no-such-domain", status=NOT_FOUND)
    assert "there is no machine 'no-such-domain'" in said.err and "virsh list --all" in said.err
    for uri, status, words in (
        (f"qemu+unix:///system?socket={tmp_path}/none", TOOL, "cannot connect to libvirt"),
        ("test:///default", REFUSED, "not QEMU's: its driver is TEST"),
        lxc(web),
        ("nonsense:///x", TOOL, "cannot connect to libvirt"),
    ):
        with of_libvirt(uri):
            found = command("tree", web.name, state=web.state)
            listed = command("list", state=web.state)
        assert (found.status, words in found.err) == (status, True), (uri, found)
        assert listed.status == 0 and "domains are left out" in listed.err
        found = command("tree", "--connect", uri, web.name, state=web.state)
        assert found.status == status and words in found.err
        found = command("--connect", uri, "list", state=web.state)
        assert found.status == status
    # Where nothing was named, no libvirt is no fault.
    os.environ.pop(URI, None)
    assert "no-such" in command("tree", "no-such-domain", state=web.state).err
    for line in ("start @", "stop @", "set @ --nvram x", "disk attach @ vdb=x", "disk detach @ vda"):
        assert "libvirt" in web(line, status=REFUSED).err


def without(module: str, web: DomainScene, *words: str) -> subprocess.CompletedProcess[str]:
    """What the command says where that module is not installed."""
    program = (
        f"import sys; sys.modules[{module!r}] = None; from snaptree.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        env={**os.environ, URI: web.own.uri, "SNAPTREE_STATE": str(web.state)},
        cwd=web.disks,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("module", "words"),
    [("libvirt", "libvirt's Python binding is not installed"), ("lxml", "lxml is not installed")],
)
def test_what_it_needs_is_not_installed(web: DomainScene, module: str, words: str) -> None:
    """Each command that has to read a domain says so; machines that were added work as ever, and are listed."""
    web.image("own.qcow2", word="o")
    before = web.listed(), web.files(), web.virsh("dumpxml", "@", "--inactive")
    done = without(module, web, "add", "own", "--disk", "vda=own.qcow2")
    assert done.returncode == 0, done
    commands = ("tree", "show", "verify", "gc")
    for line in (*((each, web.name) for each in commands), ("snapshot", web.name, "s1"), ("delete", web.name, "s1")):
        done = without(module, web, *line)
        assert done.returncode == TOOL and words in done.stderr, done
        assert "install snaptree[libvirt]" in done.stderr and "Traceback" not in done.stderr, done
    assert without(module, web, "snapshot", "own", "s1").returncode == 0
    done = without(module, web, "list")
    assert done.returncode == 0 and "own" in done.stdout and "left out: " + words in done.stderr, done
    assert (web.listed(), web.virsh("dumpxml", "@", "--inactive")) == (before[0], before[2])
    assert web("remove own").status == 0
    assert before[1] <= web.files()


def test_who_may_not(web: DomainScene) -> None:
    socket = web.own.uri.split("socket=")[1]
    os.chmod(socket, 0o700)
    try:
        done = subprocess.run(
            ["setpriv", "--reuid", "65534", "--clear-groups", *scene.TOOL, "tree", web.name],
            env={**os.environ, URI: web.own.uri, "SNAPTREE_STATE": "/nonexistent/state"},
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )
    finally:
        os.chmod(socket, 0o777)
    assert done.returncode == REFUSED, done.stderr
    assert "cannot connect to libvirt" in done.stderr and "group that may use libvirt" in done.stderr


@pytest.mark.parametrize(
    "name", ["99999999999999", "²", "-1", "0", "no\udcffbytes", "a" * 5000, "1" * 5000, "\n", "%s"]
)
def test_names_that_no_domain_has(web: DomainScene, name: str) -> None:
    for line in ("tree", "snapshot"):
        said = web(f"{line} {shlex.quote(name)} {'s1' if line == 'snapshot' else ''}", status=None)
        assert said.status in (2, 3), (line, said.err)


def over_ssh(web: DomainScene) -> str:
    """A connection as to another host, through a program that leads to this libvirtd all the same."""
    bridge = web.folder / "bridge"
    socket = urlsplit(web.own.uri).query.partition("socket=")[2]
    bridge.write_text(
        f"#!{sys.executable}\nimport os, socket, threading\ns = socket.socket(socket.AF_UNIX)\n"
        f"s.connect({unquote(socket)!r})\n"
        "def pump(read, write):\n"
        "    while data := read(65536):\n        write(data)\n    os._exit(0)\n"
        "threading.Thread(target=pump, args=(lambda n: os.read(0, n), s.sendall)).start()\n"
        "pump(s.recv, lambda data: os.write(1, data))\n"
    )
    bridge.chmod(0o755)
    return f"qemu+ssh://elsewhere.example/system?command={bridge}&proxy=netcat"


def test_the_domains_of_another_host(web: DomainScene) -> None:
    """Its files have the names of some here, maybe; none is touched."""
    before = web.files()
    for line in ("tree @", "snapshot @ s1", "list"):
        said = web(f"{line} --connect '{over_ssh(web)}'", status=REFUSED)
        assert "another host's" in said.err
    assert web.files() == before and web.listed() == {}


def test_a_managed_save(web: DomainScene) -> None:
    web.virsh("start", "@")
    web.virsh("managedsave", "@")
    said = web("snapshot @ s1", status=REFUSED)
    assert "managed save" in said.err and "virsh managedsave-remove" in said.err
    assert web("tree @").status == 0
    web.virsh("managedsave-remove", "@")
    web("snapshot @ s1")
