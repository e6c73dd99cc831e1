"""A libvirt domain for a scenario: driven by snaptree's command line and by virsh, its disks read slot by slot."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lxml import etree
from tests.kit import images
from tests.kit.libvirtd import Libvirtd
from tests.kit.scene import SLOT, SLOTS, Said, Scene, command, point_in, points_of, standing_on, word_of

from snaptree.store.libvirt.calls import Libvirt, connected

SCHEMA = Path("/usr/share/libvirt/schemas/domainsnapshot.rng")
AS_THE_TESTS_HAVE_IT = "tainted: running with undesirable elevated privileges"
"""What libvirt notes of a QEMU that it runs as root."""
URI = "LIBVIRT_DEFAULT_URI"
_DOMAIN = """<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os>{more}<devices>{disks}{devices}</devices></domain>"""


def define_text(
    name: str, number: str, disks: Iterable[tuple[str, Path, str]], *, more: str = "", devices: str = ""
) -> str:
    """A domain's XML.

    :param disks: target, path and format; what is no regular file is a block device.
    """
    elements = []
    for target, path, form in disks:
        kind, key = ("block", "dev") if path.is_block_device() else ("file", "file")
        bus = "scsi" if target.startswith("sd") else "virtio"
        elements.append(
            f"<disk type='{kind}' device='disk'><driver name='qemu' type='{form}'/><source {key}='{path}'/>"
            f"<target dev='{target}' bus='{bus}'/></disk>"
        )
    if any("bus='scsi'" in each for each in elements):
        elements.append("<controller type='scsi' model='virtio-scsi'/>")
    return _DOMAIN.format(name=name, uuid=number, disks="".join(elements), more=more, devices=devices)


@contextlib.contextmanager
def of_libvirt(uri: str) -> Iterator[None]:
    """Use this connection."""
    before = os.environ.get(URI)
    os.environ[URI] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ[URI]
        else:
            os.environ[URI] = before


class VirshRefusal(Exception):
    """virsh failed; the text is what it said."""


class DomainScene(Scene):
    """A folder that libvirt's user may use, with images of eight slots of 64 KiB each, and a domain on them.

    ``name`` is the domain's: all tests share one libvirtd.
    """

    def __init__(self, folder: Path, own: Libvirtd) -> None:
        super().__init__(folder)
        self.own = own
        self.uuid = str(uuid.uuid4())
        self.name = f"web-{self.uuid[:8]}"
        folder.chmod(0o755)
        self.disks.chmod(0o755)

    def __call__(self, line: str, *, status: int | None = 0) -> Said:
        """Run ``snaptree LINE`` with this libvirt; ``@`` is the domain's name. It must end with the status."""
        with of_libvirt(self.own.uri):
            return super().__call__(line.replace("@", self.name), status=status)

    def command(self, line: str, **environment: str) -> subprocess.Popen[str]:
        """The same in a process of its own."""
        return super().command(line.replace("@", self.name), **{URI: self.own.uri}, **environment)

    def virsh(self, *words: str | Path) -> str:
        """What virsh prints; ``@`` is the domain's name.

        :raise VirshRefusal: it failed.
        """
        try:
            return self.own.virsh(*(self.name if each == "@" else each for each in words))
        except subprocess.CalledProcessError as error:
            raise VirshRefusal(str(error.stderr).strip()) from error

    def define(self, *disks: str, more: str = "", devices: str = "") -> None:
        """Define the domain; a disk is ``TARGET=FILE`` (qcow2, or raw by its name), made if it is not there."""
        found = []
        for each in disks:
            target, _, name = each.partition("=")
            form = "raw" if name.endswith(".raw") else "qcow2"
            path = self.disks / name
            if not path.exists():
                images.create(path, SLOTS * SLOT, form)
            found.append((target, path, form))
            # As virt-install makes them, and virsh its overlays.
            path.chmod(0o600)
        self.define_xml(define_text(self.name, self.uuid, found, more=more, devices=devices))

    def define_xml(self, text: str) -> None:
        """Define a domain by its XML."""
        file = self.folder / "domain.xml"
        file.write_text(text)
        self.virsh("define", file)

    # ---- what there is --------------------------------------------------------------------------------------------

    def show(self, machine: str = "") -> Any:
        return super().show(machine or self.name)

    def format_of(self, path: Path | str, machine: str = "") -> str:
        return super().format_of(path, machine or self.name)

    def names(self, machine: str = "") -> dict[str, Any]:
        return super().names(machine or self.name)

    def shows(self, name: str = "main", disk: str = "vda", machine: str = "") -> str:
        shown = self.show(machine)
        if shown["state"] == "off":
            return super().shows(name, disk, machine or self.name)
        point = point_in(shown, name, disk)
        return word_of(self.unlocked(point["path"], point["internal"], shown))

    def path(self, name: str, disk: str = "vda", machine: str = "") -> Path:
        return super().path(name, disk, machine or self.name)

    def chain(self, name: str = "main", disk: str = "vda", machine: str = "") -> list[str]:
        return super().chain(name, disk, machine or self.name)

    def write(self, word: str, disk: str = "vda", machine: str = "") -> None:
        """The guest writes to what libvirt starts it with.

        Off, it was on for a moment; of one that runs, what it has written is put there while it is off for a moment.
        """
        runs = self.runs(machine)
        if runs:
            self.virsh("destroy", machine or "@")
        path, form = self.source(disk, machine)
        self.fill(path, form, word)
        if runs:
            self.virsh("start", machine or "@")

    def runs(self, machine: str = "") -> bool:
        """Whether the domain has a QEMU."""
        return self.virsh("domstate", machine or "@").strip() != "shut off"

    def be(self, state: str) -> None:
        """Let the domain be ``off`` or ``running``."""
        if self.runs() != (state == "running"):
            self.virsh("start" if state == "running" else "destroy", "@")

    def back(self, name: str) -> None:
        """virsh goes back to a snapshot; a domain that ran runs again."""
        runs = self.runs()
        for attempt in range(3):
            try:
                self.virsh("snapshot-revert", "@", name)
                break
            except VirshRefusal as error:
                # virsh names its overlays by the second.
                assert "already exists" in str(error) and attempt < 2, error
                time.sleep(1.1)
        self.be("running" if runs else "off")

    def definition(self, machine: str = "") -> Any:
        """The domain's definition, as XML."""
        return etree.fromstring(self.virsh("dumpxml", "--inactive", machine or "@"))

    def source(self, disk: str = "vda", machine: str = "") -> tuple[Path, str]:
        """The file or device that libvirt starts the domain with, and the format that it gives it."""
        return source_in(self.definition(machine), disk)

    def virsh_shows(self, disk: str = "vda") -> str:
        """What libvirt would start the domain with."""
        path, form = self.source(disk)
        return word_of(self.unlocked(str(path), None, self.show()) if self.runs() else images.read(path, form))

    @staticmethod
    def unlocked(path: str, tag: str | None, shown: Any) -> bytes:
        """What a layer shows while a QEMU has it open."""
        return images.read_unlocked(standing_on(path, shown), tag)

    def written(self, machine: str) -> set[str]:
        shown = self.show(machine)
        return {each["path"] for each in shown["disks"]} if shown["state"] != "off" else set()

    def listed(self) -> dict[str, str | None]:
        """virsh's snapshots, and the parent of each."""
        found: dict[str, str | None] = {}
        for row in self.virsh("snapshot-list", "@", "--parent").splitlines():
            # NAME YYYY-MM-DD HH:MM:SS +ZONE STATE [PARENT]
            columns = row.split()
            found[columns[0]] = columns[5] if len(columns) > 5 else None
        return found

    def current(self) -> str | None:
        """The snapshot that virsh takes for current."""
        try:
            return self.virsh("snapshot-current", "@", "--name").strip()
        except VirshRefusal:
            return None

    def record(self, name: str) -> Any:
        """libvirt's record of a snapshot, as XML."""
        return etree.fromstring(self.virsh("snapshot-dumpxml", "@", name))

    def records(self) -> dict[str, Any]:
        """All of them, without a virsh for each."""
        libvirt = Libvirt(self.own.uri)
        try:
            found = libvirt.find(self.name)
            assert found is not None
            return {name: etree.fromstring(text) for name, text in found.records().items()}
        finally:
            libvirt.close()

    def chains(self) -> dict[str, list[str]]:
        """The files of each disk as libvirt has them: of one that runs, what its QEMU has open."""
        found = connected(self.own.uri).find(self.name)
        assert found is not None
        return {target: list(chain) for target, chain in found.chains().items()}

    # ---- what must hold -------------------------------------------------------------------------------------------

    def agree(self) -> None:
        """libvirt and snaptree say the same, the records are as libvirt's schema has them, and so do they stay when the
        state file is gone; and nothing went past libvirt to its QEMU."""
        shown, definition = self.show(), self.definition()
        for each in shown["disks"]:
            assert source_in(definition, each["target"])[0] == Path(each["path"])
        for line in self.virsh("domblklist", "@").splitlines():
            target, path = line.split(None, 1)
            known = [os.path.realpath(each["path"]) for each in shown["disks"] if each["target"] == target]
            assert os.path.realpath(path.strip()) in known or not known
        if shown["state"] != "off":
            # What QEMU has open, as the live definition's <backingStore> says.
            chains = self.chains()
            for each in shown["disks"]:
                assert chains[each["target"]] == [path for path, _ in standing_on(each["path"], shown)], each["target"]
        found = self.findings(self.name)
        found = [each for each in found if " is left alone: " not in each["detail"]]
        wrong = [each for each in found if each["severity"] == "error" or each["kind"] in ("records", "note")]
        assert wrong == [], wrong
        listed = self.records()
        parents = {name: record.findtext("parent/name") for name, record in listed.items()}
        assert tree_of(self.virsh("snapshot-list", "@", "--tree")) == parents
        parked = {each["name"] for each in shown["branches"] if not each["active"]}
        names = {each["name"] for each in shown["snapshots"]} | parked
        assert names <= set(listed) and set(listed) - names <= {"snaptree-placeholder"}
        if any(each.find("disks/disk[@snapshot='external']") is not None for each in listed.values()):
            assert self.current() is not None
        schema = record_schema()
        for name, record in listed.items():
            assert record.findall(".//backingStore") == [], name
            assert schema.validate(record), schema.error_log
        assert definition.findall("devices/disk/backingStore") == []
        one, other = map(_without_what_is_remembered, (shown, self.forgotten()))
        assert one == other, {key: (one[key], other[key]) for key in one if one[key] != other.get(key)}
        noted = self.virsh("dominfo", "@").replace(AS_THE_TESTS_HAVE_IT, "")
        assert "tainted" not in noted, noted

    def forgotten(self) -> Any:
        """``show --json`` with a state folder in which nothing is remembered."""
        with of_libvirt(self.own.uri):
            said = command("show", self.name, "--json", state=self.folder / "no-state")
        assert said.status == 0, said.err
        return said.json

    def sound(self, *machines: str) -> None:
        with of_libvirt(self.own.uri):
            super().sound(*(machines or (self.name,)))
        before = self.name
        for each in machines or (before,):
            self.name = each
            self.agree()
        self.name = before

    def remove(self) -> None:
        """Take the domain away."""
        with contextlib.suppress(VirshRefusal):
            self.virsh("destroy", "@")
        with contextlib.suppress(VirshRefusal):
            self.virsh("undefine", "@", "--snapshots-metadata", "--managed-save", "--nvram", "--checkpoints-metadata")


def source_in(definition: Any, disk: str) -> tuple[Path, str]:
    """The file or device of a disk in a definition, and its format."""
    for each in definition.findall("devices/disk"):
        if each.find("target").get("dev") == disk:
            source = each.find("source")
            return Path(source.get("file") or source.get("dev")), each.find("driver").get("type")
    raise AssertionError(f"the domain has no disk {disk}")


@functools.cache
def record_schema() -> Any:
    """libvirt's schema of a record."""
    assert SCHEMA.exists(), "libvirt's schemas are not installed: they are in libvirt-common"
    return etree.RelaxNG(etree.parse(str(SCHEMA)))


def tree_of(text: str) -> dict[str, str | None]:
    """What ``virsh snapshot-list --tree`` draws: each name, and the one that it hangs from."""
    found: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for row in text.splitlines():
        name = row.lstrip(" |").removeprefix("+- ")
        if not name:
            continue
        column = len(row) - len(name)
        while above and above[-1][0] >= column:
            above.pop()
        found[name] = above[-1][1] if above else None
        above.append((column, name))
    return found


def _without_what_is_remembered(shown: Any) -> Any:
    """The order of layers follows their ids, which are only remembered, and so is why something is pending; what files
    occupy changes while a guest writes."""
    moving = ("allocated", "frees") if shown["state"] == "running" else ()

    def still(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key not in moving} for row in rows]

    layers = still(sorted(shown["layers"], key=lambda each: (each["disk"], each["path"])))
    named = {key: still(shown[key]) for key in ("snapshots", "branches")}
    return {**shown, **named, "layers": layers, "pending": []}


@contextlib.contextmanager
def kept_folder(place: Path | None = None) -> Iterator[Path]:
    """A folder that every user may look into; pytest's own are private.

    :param place: where that folder is.
    """
    folder = Path(tempfile.mkdtemp(prefix="snaptree-domain-", dir=place or images.SCRATCH))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def domain_scene(own: Libvirtd, place: Path | None = None) -> Iterator[DomainScene]:
    """A scene in a folder that every user may look into, there if a place is named."""
    with kept_folder(place) as folder:
        scene = DomainScene(folder, own)
        try:
            yield scene
        finally:
            scene.remove()


def refused(scene: DomainScene, *words: str | Path) -> str:
    """virsh refuses this; what it says."""
    try:
        scene.virsh(*words)
    except VirshRefusal as error:
        return str(error)
    raise AssertionError(f"virsh {' '.join(map(str, words))} did it")


def line(web: DomainScene, *names: str) -> None:
    """Snapshots in a row (``s1``, ``s2`` and ``s3``, if none are named), and after each its number in its slot."""
    for name in names or ("s1", "s2", "s3"):
        web(f"snapshot @ {name}")
        web.write("." * int(name[-1]) + name[-1])


def grown(web: DomainScene, *names: str) -> None:
    """As :func:`line`, but external snapshots of virsh's own."""
    for name in names:
        web.virsh("snapshot-create-as", "@", name, "--disk-only")
        web.write("." * int(name[-1]) + name[-1])


REFUSES = {
    "B1": "deletion of external disk snapshot with multiple children snapshots not supported",
    "B2": "deletion of active external snapshot that is not a leaf snapshot is not supported",
    "B3": "deletion of non-leaf external snapshot that is not in active chain is not supported",
    "B6": "deleting external snapshot that has internal snapshot as parent not supported",
    "B7": "is not the same as disk image currently used by VM",
}
"""What virsh cannot delete of what snaptree keeps: the row of what libvirt refuses, and its words."""


def goes_on(web: DomainScene, to: str) -> None:
    """virsh takes a snapshot, goes back, and deletes, at last also what snaptree has kept; what it does not touch
    stays."""
    held = {name: web.shows(name) for name in (*web.names(), to) if name != web.show()["active_branch"]}
    here = web.virsh_shows()
    web.virsh("snapshot-create-as", "@", "by-virsh", "--disk-only")
    assert web.virsh_shows() == here
    web.virsh("snapshot-delete", "@", "by-virsh")
    assert web.virsh_shows() == here
    web.back(to)
    assert web.virsh_shows() == held[to]
    assert {name: web.shows(name) for name in held} == held
    left_behind(web)
    web("snapshot @ after-virsh")
    web.sound()
    assert deleted_by_virsh(web, "after-virsh"), "it is a leaf that is worked on"
    # One more that was there before virsh came, if virsh can.
    for name in reversed(web.show()["snapshots"]):
        if deleted_by_virsh(web, name["name"]):
            break


def contents(web: DomainScene) -> dict[tuple[str, str], bytes]:
    """What every name shows on each disk."""
    shown = web.show()
    return {
        (named["name"], disk): web.unlocked(point["path"], point["internal"], shown)
        for named in (*shown["snapshots"], *shown["branches"])
        for disk, point in points_of(named).items()
    }


def deleted_by_virsh(web: DomainScene, name: str) -> bool:
    """virsh deletes this snapshot of snaptree's, and nothing else changes; or refuses, for a reason that is known, and
    nothing does at all."""
    before = contents(web)
    try:
        web.virsh("snapshot-delete", "@", name)
    except VirshRefusal as error:
        assert any(words in str(error) for words in REFUSES.values()), error
        assert contents(web) == before
        return False
    left_behind(web)
    kept = {key: content for key, content in before.items() if key[0] != name}
    assert name not in web.listed() and contents(web) == kept
    web("verify @ --repair")
    assert contents(web) == kept
    web.sound()
    return True


def left_behind(web: DomainScene) -> None:
    """What virsh no longer needs it leaves behind, where unlinking it could have harmed somebody."""
    shown = web.show()
    needed = {each["path"] for each in (*shown["layers"], *shown["memories"])}
    web.left |= {path for path in web.disks.iterdir() if str(path) not in needed}
