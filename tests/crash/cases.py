"""Every kind of operation on every shape of tree: what the crash matrix goes through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from msgspec.structs import replace
from tests.kit import images, luks
from tests.kit.images import KiB
from tests.kit.world import World

from snaptree.machines.options import AddOptions, DiskOption
from snaptree.planning.adopt import DetachRequest
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.sweep import SquashRequest
from snaptree.planning.verbs import DeleteBranchRequest, GcRequest, RemoveRequest, RenameRequest, Request, SetRequest

SIZE = 512 * KiB


@dataclass(frozen=True)
class Case:
    """One operation on one shape of tree.

    ``build`` makes the tree, ``request`` what is interrupted. ``shares``: on a file system whose files
    can share blocks. ``by_qemu``: QEMU's jobs move the data, not the mover. ``perform`` carries it out where a
    machine's ``run`` does not, ``done`` tells that it has come to pass where the tree does not.
    """

    build: Callable[[World], None]
    request: Callable[[World], Request]
    shares: bool = False
    by_qemu: bool = False
    perform: Callable[[World], object] | None = None
    done: Callable[[World], bool] | None = None


def machine(world: World) -> None:
    """``web1`` with a qcow2 and a raw disk."""
    root = images.create(world.images / "vda.qcow2", SIZE)
    raw = images.create(world.images / "vdb.img", SIZE, "raw")
    images.io(root, "qcow2", "write -P 1 0 128k")
    images.io(raw, "raw", "write -P 2 64k 128k")
    world.add({"vda": (root, "qcow2"), "vdb": (raw, "raw")})


def write(world: World, number: int) -> None:
    """The guest writes to both disks, partly over what was there."""
    for disk in world.tree.disks:
        world.write(disk, f"write -P {number} {number * 32 % 384}k 96k", f"write -z {(number * 96 + 64) % 448}k 32k")


def line(world: World, count: int = 3, *, internal: tuple[int, ...] = ()) -> None:
    """s1, s2, s3 … with writing between; those that are named as internal are so where they can be."""
    machine(world)
    for number in range(1, count + 1):
        world.run(SnapshotRequest(f"s{number}", number in internal))
        write(world, number + 10)


def forked(world: World) -> None:
    """s1 <- (s2 <- main), other, third."""
    line(world, 2)
    world.run(BranchRequest("other", "s1"))
    world.run(BranchRequest("third", "s1"))
    world.run(SwitchRequest("other"))
    write(world, 31)
    world.run(SwitchRequest("main"))


def gone_back(world: World) -> None:
    """s1 <- (s2 <- main.1), main."""
    line(world, 2)
    world.run(RevertRequest("s1"))
    write(world, 41)


def loose(world: World) -> None:
    """Three layers that wait to be merged."""
    line(world, 3)
    world.run(DeleteRequest(("s1", "s2", "s3"), "none"))


def resized(world: World) -> None:
    """A short layer in the middle, and a longer one on it."""
    line(world, 1)
    for disk in world.tree.disks:
        path, form = world.tip(disk)
        images.run("qemu-img", "resize", "-q", "--shrink", "-f", form, path, str(SIZE - 160 * KiB))
        world.reread(disk)
    world.run(SnapshotRequest("s2"))
    for disk in world.tree.disks:
        path, form = world.tip(disk)
        images.run("qemu-img", "resize", "-q", "-f", form, path, str(SIZE + 64 * KiB))
        world.reread(disk)
    write(world, 51)


def with_firmware(world: World, *, kept: bool = True) -> None:
    """One disk, UEFI variables and TPM state, of which there is a copy already."""
    root = images.create(world.images / "vda.qcow2", SIZE)
    nvram, tpm = world.folder / "vars.fd", world.folder / "tpm"
    nvram.write_text("first")
    tpm.mkdir()
    (tpm / "state").write_text("first")
    world.add({"vda": (root, "qcow2")}, nvram=str(nvram), tpm=str(tpm))
    if not kept:
        return
    world.run(SnapshotRequest("s1"))
    write(world, 61)
    nvram.write_text("second")
    (tpm / "state").write_text("second")


def branched_with_firmware(world: World) -> None:
    """Two branches, each with firmware state of its own."""
    with_firmware(world)
    world.run(BranchRequest("other", "s1"))


def on_golden(world: World) -> None:
    """A line that stands on an image which others may stand on too, and may not change by a byte."""
    golden = images.create(world.images / "golden.qcow2", SIZE)
    images.io(golden, "qcow2", "write -P 3 0 256k")
    root = images.create(world.images / "vda.qcow2", SIZE, backing=(golden, "qcow2"))
    images.io(root, "qcow2", "write -P 4 64k 64k")
    world.add({"vda": (root, "qcow2")})
    world.foreign[golden] = golden.read_bytes()
    for number in (1, 2):
        world.run(SnapshotRequest(f"s{number}"))
        write(world, number + 10)


def old_and_squeezed(world: World) -> None:
    """A file of version 2, which has no zero clusters, under one with compressed clusters."""
    root = images.create(world.images / "vda.qcow2", SIZE, compat="0.10")
    images.io(root, "qcow2", "write -P 1 0 256k")
    world.add({"vda": (root, "qcow2")})
    world.run(SnapshotRequest("s1"))
    world.write("vda", "write -c -P 2 0 64k", "write -c -P 3 192k 64k", "write -z 64k 64k")
    world.run(SnapshotRequest("s2"))
    world.write("vda", "write -P 4 128k 64k")


def in_subclusters(world: World) -> None:
    """Clusters of which only parts are there."""
    root = images.create(world.images / "vda.qcow2", SIZE, extended_l2="on", cluster_size=128 * KiB)
    world.add({"vda": (root, "qcow2")})
    world.write("vda", "write -P 1 4k 300k")
    for number in (1, 2):
        world.run(SnapshotRequest(f"s{number}"))
        world.write("vda", f"write -P {number + 1} {number * 36}k 8k", f"write -z {number * 140}k 12k")


def locked(world: World) -> None:
    """An encrypted disk with an internal point between external ones, and a plain one."""
    root = images.create(world.images / "vda.qcow2", SIZE, **luks.OPTIONS)
    images.io(root, "qcow2", "write -P 1 0 128k")
    raw = images.create(world.images / "vdb.img", SIZE, "raw")
    world.add({"vda": (root, "qcow2"), "vdb": (raw, "raw")}, keys=(str(luks.key_file(world.folder)),))
    for number in (1, 2, 3):
        world.run(SnapshotRequest(f"s{number}", number == 2))
        write(world, number + 10)


def locked_line(world: World) -> None:
    """Encrypted layers alone."""
    locked(world)
    world.run(DeleteRequest(("s2",)))


def locked_and_shorter(world: World) -> None:
    """Encrypted layers, the upper one shorter, with its end within a cluster."""
    locked_line(world)
    path, form = world.tip("vda")
    images.run("qemu-img", "resize", "-q", "--shrink", *luks.opened(path, form), str(SIZE - 160 * KiB))
    world.reread("vda")


def let_go(world: World) -> None:
    """A machine whose files stay when it is forgotten."""
    forked(world)
    world.extra |= {layer.path for layer in world.tree.layers.values()}


def small_clusters(world: World) -> None:
    """Names so long, in clusters so small, that a header has no room for the old one and the new one at once."""
    root = images.create(world.images / f"{'a' * 180}.qcow2", 64 * KiB, cluster_size=512)
    world.add({"vda": (root, "qcow2")})
    for number in (1, 2, 3):
        world.run(SnapshotRequest(f"s{number}"))
        world.write("vda", f"write -P {number} {number * 8}k 4k")


def grown(world: World) -> None:
    """An internal point of before the disk became longer, over an external one."""
    line(world, 2, internal=(2,))
    path, form = world.tip("vda")
    images.run("qemu-img", "resize", "-q", "-f", form, path, str(SIZE + 64 * KiB))
    world.reread("vda")


def attachable(world: World) -> None:
    """A machine, and an image beside it."""
    line(world, 1)
    images.create(world.images / "vdc.qcow2", SIZE)
    world.extra.add(str(world.images / "vdc.qcow2"))


def addable(world: World) -> None:
    """A machine, and images for another one: a chain that is to be adopted, and a raw disk."""
    line(world, 1)
    base = images.create(world.images / "base.qcow2", SIZE)
    images.create(world.images / "top.qcow2", SIZE, backing=(base, "qcow2"))
    images.create(world.images / "data.img", SIZE, "raw")
    world.extra |= {str(world.images / name) for name in ("base.qcow2", "top.qcow2", "data.img")}


def another(world: World) -> AddOptions:
    """The other machine."""
    disks = (
        DiskOption("vda", str(world.images / "top.qcow2"), "qcow2"),
        DiskOption("vdb", str(world.images / "data.img"), "raw"),
    )
    return AddOptions("web2", disks, adopt=True)


def _of(build: Callable[[World], None], request: Request, *, shares: bool = False, by_qemu: bool = False) -> Case:
    return Case(build, lambda world: request, shares, by_qemu)


def _deletions() -> dict[str, Case]:
    shapes: dict[str, tuple[Callable[[World], None], tuple[str, ...]]] = {
        **{f"delete {name} of a line": (line, (name,)) for name in ("s1", "s2", "s3")},
        "delete a fork": (forked, ("s1",)),
        "delete what was gone back to": (gone_back, ("s1",)),
        "delete several": (line, ("s1", "s2", "s3")),
        "delete over layers of several sizes": (resized, ("s1", "s2")),
    }
    found = {}
    for way in ("auto", "commit", "pull", "none", "reflink", "commit of QEMU", "pull of QEMU"):
        for name, (build, gone) in shapes.items():
            request = DeleteRequest(gone, way.partition(" ")[0])
            found[f"{name} by {way}"] = _of(build, request, shares=way == "reflink", by_qemu=way.endswith("QEMU"))
    return found


def mixed(world: World) -> None:
    """An internal point with external ones on both sides."""
    line(world, 3, internal=(2,))


def layered(world: World) -> None:
    """Internal points in two layers that are frozen."""
    line(world, 5, internal=(2, 4))


def inner(world: World) -> None:
    """Internal points in the tip."""
    line(world, 2, internal=(1, 2))


CASES: Mapping[str, Case] = {
    "snapshot": _of(lambda world: line(world, 1), SnapshotRequest("new")),
    "snapshot with nothing written": _of(lambda world: shared(world), SnapshotRequest("new")),
    "snapshot of one disk": _of(lambda world: line(world, 1), SnapshotRequest("new", exclude=("vdb",))),
    "internal snapshot": _of(lambda world: line(world, 1), SnapshotRequest("new", True)),
    "first snapshot with firmware": _of(lambda world: with_firmware(world, kept=False), SnapshotRequest("new")),
    "snapshot with firmware": _of(with_firmware, SnapshotRequest("new")),
    **_deletions(),
    "delete where names are long": _of(small_clusters, DeleteRequest(("s2",), "pull")),
    **{
        f"delete {name} over a golden image by {way}": _of(
            on_golden, DeleteRequest((name,), way), shares=way == "reflink"
        )
        for name in ("s1", "s2")
        for way in ("commit", "pull", "reflink")
    },
    **{
        f"delete {name} of old and squeezed images by {way}": _of(old_and_squeezed, DeleteRequest((name,), way))
        for name in ("s1", "s2")
        for way in ("commit", "pull")
    },
    **{
        f"delete {name} of images in subclusters by {way}": _of(
            in_subclusters, DeleteRequest((name,), way), shares=way == "reflink"
        )
        for name in ("s1", "s2")
        for way in ("commit", "pull", "reflink")
    },
    "delete encrypted layers by commit": _of(locked_line, DeleteRequest(("s1",), "commit")),
    "delete encrypted layers by pull": _of(locked_line, DeleteRequest(("s3",), "pull")),
    "delete under a shorter encrypted layer by commit": _of(locked_and_shorter, DeleteRequest(("s3",), "commit")),
    "snapshot of an encrypted disk": _of(locked, SnapshotRequest("new")),
    "internal snapshot of an encrypted disk": _of(locked, SnapshotRequest("new", True)),
    "delete an internal one of an encrypted disk": _of(locked, DeleteRequest(("s2",))),
    "revert to an encrypted internal one": _of(locked, RevertRequest("s2", True)),
    "branch from an encrypted internal one": _of(locked, BranchRequest("new", "s2")),
    "delete under a shorter layer by commit": _of(resized, DeleteRequest(("s1",), "commit")),
    "delete under a shorter layer by reflink": _of(resized, DeleteRequest(("s1",), "reflink"), shares=True),
    "delete with children": _of(forked, DeleteRequest(("s1",), children=True, with_branches=True)),
    "delete the children only": _of(line, DeleteRequest(("s1",), children_only=True)),
    "delete a branch": _of(forked, DeleteBranchRequest("other")),
    "delete a branch with firmware": _of(branched_with_firmware, DeleteBranchRequest("other")),
    "delete an internal one": _of(inner, DeleteRequest(("s1",))),
    "delete internal ones of frozen layers": _of(layered, DeleteRequest(("s2", "s4"))),
    "delete internal and external ones": _of(mixed, DeleteRequest(("s1", "s2", "s3"))),
    "delete with firmware": _of(with_firmware, DeleteRequest(("s1",))),
    "revert": _of(line, RevertRequest("s2")),
    "revert, keep as": _of(line, RevertRequest("s2", keep_as="kept")),
    "revert, discard": _of(line, RevertRequest("s2", True)),
    "revert, discard, delete": _of(line, RevertRequest("s3", True, delete=True)),
    "revert, discard, children": _of(line, RevertRequest("s1", True, delete=True, children=True)),
    "revert, delete": _of(line, RevertRequest("s2", delete=True)),
    "revert within the tip": _of(inner, RevertRequest("s1")),
    "revert within the tip, discard": _of(inner, RevertRequest("s1", True)),
    "revert within the tip, discard, delete": _of(inner, RevertRequest("s2", True, delete=True)),
    "revert to an internal one below": _of(mixed, RevertRequest("s2")),
    "revert to an internal one below, by QEMU": _of(mixed, RevertRequest("s2"), by_qemu=True),
    "revert with firmware": _of(with_firmware, RevertRequest("s1")),
    "revert, discard, with firmware": _of(with_firmware, RevertRequest("s1", True, delete=True)),
    "branch from a snapshot": _of(line, BranchRequest("new", "s1")),
    "branch from here": _of(line, BranchRequest("new")),
    "branch from an internal one": _of(mixed, BranchRequest("new", "s2")),
    "branch from an internal one, of shared blocks": _of(mixed, BranchRequest("new", "s2"), shares=True),
    "branch from an internal one, by QEMU": _of(mixed, BranchRequest("new", "s2"), by_qemu=True),
    "branch from a shorter internal one": _of(grown, BranchRequest("new", "s2")),
    "branch from a shorter internal one, by QEMU": _of(grown, BranchRequest("new", "s2"), by_qemu=True),
    "branch with firmware": _of(with_firmware, BranchRequest("new", "s1")),
    "switch with firmware": _of(branched_with_firmware, SwitchRequest("other")),
    "switch": _of(forked, SwitchRequest("other")),
    "switch to an internal one": _of(lambda world: parked_inside(world), SwitchRequest("main.1")),
    "rename": _of(line, RenameRequest("s1", "new")),
    "rename the branch of now": _of(line, RenameRequest("main", "new")),
    "squash": _of(loose, SquashRequest("vda")),
    "squash by commit": _of(loose, SquashRequest("vdb", merge="commit")),
    "squash by pull": _of(loose, SquashRequest("vda", merge="pull")),
    "squash by reflink": _of(loose, SquashRequest("vda", merge="reflink"), shares=True),
    "gc": _of(loose, GcRequest()),
    "gc of shared blocks": _of(loose, GcRequest(), shares=True),
    "attach": Case(
        attachable,
        lambda world: world.machine.attach_request(DiskOption("vdc", str(world.images / "vdc.qcow2"), "qcow2")),
    ),
    "add": Case(
        addable,
        lambda world: GcRequest(),
        perform=lambda world: world.connection.add(another(world)),
        done=lambda world: "web2" in world.connection.names() and not world.connection.machine("web2").verify(),
    ),
    "set": Case(
        with_firmware,
        lambda world: SetRequest(replace(world.machine.config, start="qemu-system-x86_64")),
        done=lambda world: world.machine.config.start == "qemu-system-x86_64",
    ),
    "detach": _of(line, DetachRequest("vdb", True)),
    "detach, keep the files": _of(line, DetachRequest("vdb")),
    "remove, keep the files": _of(let_go, RemoveRequest()),
    "remove with firmware": _of(branched_with_firmware, RemoveRequest(True)),
    "remove": _of(forked, RemoveRequest(True)),
}


def shared(world: World) -> None:
    """A snapshot with nothing written since."""
    machine(world)
    world.run(SnapshotRequest("s1"))


def parked_inside(world: World) -> None:
    """A branch whose tip is an internal point of the layer that another one's tip is."""
    inner(world)
    world.run(RevertRequest("s1"))
    write(world, 71)
