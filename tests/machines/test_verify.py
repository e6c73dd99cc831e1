"""``verify`` finds each thing that is not as the tree says, whom it affects, and what to do."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.crash.matrix import Matrix
from tests.kit import images
from tests.kit.programs import killed
from tests.kit.scene import Scene
from tests.kit.space import held

from snaptree.images import gate, qemu_img
from snaptree.images.inode import inode_of
from snaptree.machines.connection import Connection
from snaptree.planning.steps import Step
from snaptree.running import carry
from snaptree.running.context import Context
from snaptree.store import operations
from snaptree.store.operations import Claim


def three(web1: Scene) -> None:
    """s1 <- s2 <- main, and other on s1."""
    web1("snapshot web1 s1")
    web1.write(".1")
    web1("snapshot web1 s2")
    web1.write("..m")
    web1("branch web1 other --from s1")


def changed(web1: Scene) -> None:
    images.io(web1.path("s2"), "qcow2", "write -P 9 0 64k")


def repointed(web1: Scene) -> None:
    images.run("qemu-img", "rebase", "-u", "-b", "elsewhere.qcow2", "-F", "qcow2", web1.path("s2"))


def missing(web1: Scene) -> None:
    web1.path("s2").rename(web1.folder / "away")


def replaced(web1: Scene) -> None:
    path = web1.path("s2")
    content = path.read_bytes()
    path.rename(web1.folder / "away")
    path.write_bytes(content)


def broken_counts(web1: Scene) -> None:
    path = web1.path("s2")
    with path.open("r+b") as file:
        file.seek(48)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table)
        (block,) = struct.unpack(">Q", file.read(8))
        file.seek(block)
        file.write(bytes(64))


FOUND: dict[str, tuple[Callable[[Scene], None], str, list[str]]] = {
    "changed from outside": (changed, "changed", ["main", "s2"]),
    "a wrong backing name": (repointed, "changed", ["main", "s2"]),
    "missing": (missing, "missing", ["main", "s2"]),
    "replaced by a copy": (replaced, "changed", ["main", "s2"]),
    "broken reference counts": (broken_counts, "", ["main", "s2"]),
}


@pytest.mark.parametrize("what", FOUND)
def test_it_is_found(web1: Scene, what: str) -> None:
    spoil, word, affected = FOUND[what]
    three(web1)
    path = str(web1.path("s2"))
    spoil(web1)

    found = [each for each in web1.findings() if each["path"] == path]

    assert found and found[0]["severity"] == "error"
    assert not word or found[0]["kind"] == word
    assert found[0]["affects"] == affected and found[0]["hint"]


def test_a_hopeless_image_is_not_counted_to_its_end(tmp_path: Path) -> None:
    """Twenty internal snapshots on one broken table have each of its errors again."""
    disk = images.create(tmp_path / "disk.qcow2", 4 << 20, cluster_size=1024)
    images.io(disk, "qcow2", "write -P 1 0 4M")
    with disk.open("r+b") as file:
        file.seek(40)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table)
        tables = [entry & ~(3 << 62) for (entry,) in struct.iter_unpack(">Q", file.read(32 * 8))]
    for number in range(20):
        images.run("qemu-img", "snapshot", "-c", f"s{number}", disk)
    with disk.open("r+b") as file:
        for offset in tables:
            file.seek(offset)
            entries = struct.iter_unpack(">Q", file.read(1024))
            file.seek(offset)
            file.write(b"".join(struct.pack(">Q", entry | 512) for (entry,) in entries))
    assert sum(images.problems(disk).values()) > 5 * qemu_img.MOST_ERRORS, images.problems(disk)

    found = qemu_img.check(gate.blockdev(str(disk), "qcow2", None, None))

    assert not found.whole and qemu_img.MOST_ERRORS < found.errors < 2 * qemu_img.MOST_ERRORS


def test_what_stands_on_a_layer_from_outside_is_told(web1: Scene) -> None:
    three(web1)
    web1.image("theirs.qcow2", backing="web1.qcow2")
    web1.image("machine.qcow2", backing="web1.qcow2")
    web1("add web2 --disk vda=machine.qcow2")

    findings = web1.findings()

    details = " ".join(each["detail"] for each in findings)
    assert "theirs.qcow2 stands on" in details and "machine 'web2' stands on" in details
    assert {each["severity"] for each in findings} == {"warning"}
    assert all(set(each["affects"]) == {"main", "other", "s1", "s2"} and each["hint"] for each in findings), findings


@pytest.mark.parametrize("read_only", [False, True])
def test_what_somebody_has_open_is_not_damaged(web1: Scene, read_only: bool) -> None:
    """Nobody is told to restore from a backup what just cannot be looked at, be it a machine that runs."""
    three(web1)
    with held(web1.path("main"), read_only=read_only):
        findings = web1.findings()
    assert [(each["kind"], each["severity"]) for each in findings] == ([] if read_only else [("unchecked", "note")])


@pytest.mark.parametrize("case", ["delete s1 of a line by pull", "delete s2 of a line by commit", "internal snapshot"])
def test_what_was_killed_has_changed_nothing_from_outside(case: str, tmp_path: Path) -> None:
    """Until it is recovered its layers are not what the tree knows, and nobody is told to restore them or to accept."""
    matrix = Matrix(tmp_path, case, "kill")
    world = matrix.world
    steps = sum(len(each.steps) for each in world.machine.plan(matrix.case.request(world)).every())
    for number in range(1, steps + 1):
        matrix.restore()
        request, before = matrix.case.request(world), world.tree

        def arrange(kill: Callable[[], None], number: int = number) -> None:
            words, do = iter(range(1, 100)), carry.do

            async def doing(step: Step, context: Context) -> None:
                await do(step, context)
                if next(words) == number:
                    kill()

            carry.do = doing

        killed(lambda request=request: world.machine.run(request), arrange)  # type: ignore[misc]
        assert not [each for each in world.machine.verify() if each.severity == "error"], number
        assert not [each for each in world.machine.view().ailments.values() if each.blocks]
        matrix.judge(number, request, before, interrupted=True)


def test_an_operation_that_goes_on_meanwhile_is_no_fault(web1: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is locked for looking: a layer may go that was there, and is looked for no more then."""
    three(web1)
    check, lines = qemu_img.check, iter(["delete web1 --branch other", "delete web1 s1"])

    def checking(graph: qemu_img.Graph, **more: Any) -> qemu_img.CheckResult:
        for line in lines:
            web1(line)
            break
        return check(graph, **more)

    monkeypatch.setattr(qemu_img, "check", checking)
    assert web1.findings() == []
    assert next(lines, None) is None


def test_a_file_that_nothing_needs_is_told(web1: Scene) -> None:
    """One that snaptree made, and that no tree knows: what an operation has left that could not undo all."""
    three(web1)
    left = web1.image("left.qcow2")
    database = Connection(str(web1.state)).database
    operation = operations.history(database, "web1")[-1].id
    with database.transaction() as connection:
        operations.end(connection, operation, operations.UNDONE, 0.0, 0)
        operations.claim(connection, operation, Claim(str(left), *inode_of(str(left))))

    (found,) = web1.findings()

    assert (found["kind"], found["path"], found["severity"]) == ("over", str(left), "warning")
    assert "gc web1 --delete" in found["hint"]
    web1("gc web1 --delete")
    assert not left.exists() and web1.findings() == []


def test_a_sound_machine_has_no_findings(web1: Scene, tmp_path: Path) -> None:
    three(web1)
    assert web1.findings() == []
    assert "all files are as the tree says" in web1("verify web1").out


@pytest.mark.parametrize("change", [changed, replaced], ids=lambda each: each.__name__)
def test_what_was_changed_can_be_accepted(change: Callable[[Scene], None], web1: Scene) -> None:
    """A person has looked: an image that came back from a backup, or whose bitmap was removed."""
    three(web1)
    change(web1)
    web1.left |= {web1.folder / "away"}
    path = web1.path("s2")
    assert web1("branch web1 new --from s2", status=7).err
    assert "--accept" in web1("verify web1", status=10).out
    before = web1.show()
    web1(f"verify web1 --accept {path} --plan")
    web1("verify web1", status=10)
    web1(f"verify web1 --accept {path}")
    assert web1("verify web1").out == "web1: all files are as the tree says\n"
    assert [each["name"] for each in web1.show()["snapshots"]] == [each["name"] for each in before["snapshots"]]
    web1("delete web1 s2")
    assert web1.shows() == ("b" if change is replaced else "\t") + "1m....."


def test_what_does_not_fit_cannot_be_accepted(web1: Scene) -> None:
    three(web1)
    path, tip = web1.path("s2"), web1.path("main")
    assert "a guest writes to it" in web1(f"verify web1 --accept {tip}", status=6).err
    web1(f"verify web1 --accept {web1.folder}/nothing.qcow2", status=3)
    web1("verify web1 --plan", status=2)
    repointed(web1)
    assert "as its backing file" in web1(f"verify web1 --accept {path}", status=6).err
    missing(web1)
    assert web1(f"verify web1 --accept {path}", status=6).err
