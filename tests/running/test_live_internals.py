"""Internal snapshots in a QEMU that runs: it takes and deletes them itself, and nothing that is kept changes by a byte.

QEMU is real, with no guest in it; the test writes to its disks as the guest would.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import pytest
from tests.kit import images
from tests.kit.order import Order
from tests.kit.points import tried
from tests.kit.programs import dies
from tests.kit.scene import SLOT
from tests.kit.space import held
from tests.kit.still import Still, standing
from tests.running.test_live import cutting

from snaptree.qemu.session import QmpSession
from snaptree.running.carry import live_internals
from snaptree.running.journal import Journal

FAILED = 12


@pytest.fixture
def layered(still: Still) -> Still:
    """i1 in the root and i2 in the layer above it, each frozen under an external one; i3 in the tip."""
    for number, (inner, outer) in enumerate((("i1", "s1"), ("i2", "s2"), ("i3", "")), 1):
        still.write("." * number + "i")
        still(f"snapshot web1 {inner} --internal")
        still.write("." * number + "j")
        if outer:
            still(f"snapshot web1 {outer}")
    return still


KEPT = {"i1": "bi......", "s1": "bj......", "i2": "bji.....", "s2": "bjj.....", "i3": "bjji....", "main": "bjjj...."}


def whole(still: Still, *gone: str, **more: str) -> None:
    """All that is kept shows what it showed; QEMU has no job left, and only tips open for writing."""
    wanted = {name: word for name, word in {**KEPT, **more}.items() if name not in gone}
    assert set(still.names()) == set(wanted)
    for name, word in wanted.items():
        assert still.shows(name) == word, name
    right(still)


def right(still: Still) -> None:
    """What the files, QEMU and the tree have agrees, and nothing is left to be done."""
    assert not [each for each in still.show()["pending"] if "has stopped" not in each]
    assert still.tags() == still.known_tags()
    if still.show()["state"] != "off":
        assert still.jobs() == {}
        tips = {each["path"].rpartition("/")[2] for each in still.show()["disks"] if each["path"].endswith("qcow2")}
        assert {name for name, how in still.opened().items() if how == "writing"} == tips
    still.sound()


# ---- taking -------------------------------------------------------------------------------------------------------


def test_internal_and_external_points_of_one_instant() -> None:
    """B11: a raw disk goes on in an overlay, the others in their files."""
    with standing(3, raw=True) as still:
        plan = still("snapshot web1 s1 --internal --plan --json").json
        assert [each["kind"] for each in plan["steps"]] == ["make-overlay", "live-snapshot", "record"]
        assert plan["estimate"] and 0 < plan["guest_pause"] < 0.1
        assert any("raw" in each for each in plan["notes"])
        still("snapshot web1 s1 --internal")
        for disk in still.targets:
            still.write(".x", disk)
        assert still.names()["s1"]["kind"] == "mixed"
        assert {still.shows("s1", disk) for disk in still.targets} == {"b......."}
        assert {still.shows("main", disk) for disk in still.targets} == {"bx......"}
        assert [still.disk(disk) for disk in still.targets] == ["vda.qcow2", "vdb.qcow2", "vdc.s1.qcow2"]
        still("snapshot web1 s2 --internal")
        assert still.names()["s2"]["kind"] == "internal" and still.files() == {
            "vda.qcow2",
            "vdb.qcow2",
            "vdc.raw",
            "vdc.s1.qcow2",
        }
        right(still)
        still("stop web1 --force")
        assert still.shows("s1", "vdb") == "b......." and still.shows("main", "vdb") == "bx......"
        still("revert web1 s1 --discard")
        assert {still.shows("main", disk) for disk in still.targets} == {"b......."}
        still.sound()


def test_a_disk_that_cannot_have_one_keeps_all_from_having_one() -> None:
    """What QEMU refuses for one disk it takes back on the others."""
    with standing(2) as still:
        with still.qmp() as qmp:
            top = next(each["inserted"]["node-name"] for each in qmp("query-block") if "/vdb/" in each["qdev"])
            target = {"driver": "null-co", "node-name": "nothing", "size": 8 * SLOT, "read-zeroes": True}
            qmp("blockdev-add", **target)
            qmp("blockdev-mirror", job_id="mine", device=top, target="nothing", sync="full", speed=4096)
        said = still("snapshot web1 s1 --internal", status=FAILED)
        assert "refused transaction" in said.err
        assert still.tags() == {} and set(still.names()) == {"main"}
        with still.qmp() as qmp:
            qmp("block-job-cancel", device="mine", force=True)
        still("snapshot web1 s1 --internal")
        assert still.tags() == {"vda.qcow2": {"s1"}, "vdb.qcow2": {"s1"}}


# ---- deleting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["i1", "i2", "i3"])
def test_one_is_deleted_wherever_it_is(layered: Still, name: str) -> None:
    """B7: in the tip, beneath an overlay, and two levels down."""
    plan = layered(f"delete web1 {name} --plan --json").json
    kinds = [each["kind"] for each in plan["steps"]]
    assert kinds == [*([] if name == "i3" else ["live-open"]), "record", "delete-internal"]
    before = layered.opened()
    layered(f"delete web1 {name}")
    assert layered.opened() == before
    layered.write("......x")
    whole(layered, name, main="bjjj..x.")
    layered.kill_qemu()
    whole(layered, name, main="bjjj..x.")


def test_all_are_deleted_and_what_is_loose_then_is_merged(layered: Still) -> None:
    layered("delete web1 i1 i2 i3 s1 s2")
    layered.write("......x")
    whole(layered, *("i1", "i2", "i3", "s1", "s2"), main="bjjj..x.")
    assert layered.files() == {"vda.qcow2"}
    layered.kill_qemu()
    layered.sound()


def test_a_mixed_subtree_goes(layered: Still) -> None:
    """B5: external and internal children."""
    layered("delete web1 s1 --children")
    whole(layered, "s1", "i2", "s2", "i3")
    layered.write("......x")
    whole(layered, "s1", "i2", "s2", "i3", main="bjjj..x.")
    layered("delete web1 i1")
    whole(layered, *KEPT.keys() - {"main"}, main="bjjj..x.")


def test_in_a_layer_that_it_has_not_open_one_is_deleted_beside_it(layered: Still) -> None:
    layered("branch web1 other --from s1")
    layered("switch web1 other")
    layered.write(".......o")
    assert layered.disk() == "vda.other.qcow2"
    before = layered.opened()
    layered("delete web1 i2 i3")
    whole(layered, "i2", "i3", other="bj.....o")
    assert layered.opened() == before


def test_room_is_given_back_where_nobody_writes(layered: Still) -> None:
    root = layered.disks / "vda.qcow2"
    layered("snapshot web1 large --internal")
    layered("delete web1 large")
    before = root.stat().st_blocks
    layered("delete web1 i1")
    assert root.stat().st_blocks < before
    whole(layered, "i1")


def test_the_tables_are_on_disk_before_room_is_given_back(layered: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they referred to may be read until then."""
    order, root = Order(monkeypatch), str(layered.disks / "vda.qcow2")
    order.watch(live_internals, "_delete", "deleted")
    order.watch(live_internals, "punch_free", "punched")
    layered("delete web1 i1")
    assert root in order.before_last("punched", since="deleted")


def test_what_somebody_else_reads_is_left_alone(layered: Still) -> None:
    """Another QEMU that stands on the layer: the name stays, and nothing is left to be done."""
    other = images.create(layered.folder / "other.qcow2", 8 * SLOT, backing=(layered.disks / "vda.qcow2", "qcow2"))
    with held(other, "qcow2"):
        said = layered("delete web1 i1", status=FAILED)
        assert "writing" in said.err and "nobody else" in said.err
        whole(layered)
        layered("delete web1 i3")
        whole(layered, "i3")
    layered("delete web1 i1")
    whole(layered, "i1", "i3")


def test_a_machine_that_somebody_started_with_drive() -> None:
    """Its nodes have names that QEMU made up."""
    with standing() as still:
        still("snapshot web1 i1 --internal")
        still.write(".i")
        still("snapshot web1 s1")
        still("snapshot web1 i2 --internal")
        still("stop web1 --force")
        still.by_hand("-drive file={vda},format=qcow2,if=none,id=d -device virtio-blk-pci,drive=d,id=vda")
        still("snapshot web1 i3 --internal")
        still.write("..k")
        for name in ("i1", "i2", "i3"):
            still(f"delete web1 {name}")
        assert still.shows("s1") == "bi......" and still.shows() == "bik....."
        right(still)
        still.kill_qemu()
        still.sound()


# ---- merging beside them ------------------------------------------------------------------------------------------


def test_data_goes_down_into_a_layer_that_has_one(layered: Still) -> None:
    layered("delete web1 i2 --merge none")
    plan = layered("delete web1 s1 --plan --json").json
    assert plan["way"] == "commit"
    layered("delete web1 s1")
    whole(layered, "i2", "s1")
    layered.write("......x")
    layered("delete web1 i1 i3")
    layered("delete web1 s2")
    whole(layered, "i1", "i2", "i3", "s1", "s2", main="bjjj..x.")


def test_the_tip_goes_down_into_a_layer_that_has_one(still: Still) -> None:
    still("snapshot web1 i1 --internal")
    still.write(".c")
    still("snapshot web1 s1")
    still.write("..d")
    still("delete web1 s1")
    assert still.disk() == "vda.qcow2" and still.files() == {"vda.qcow2"}
    still.write("...e")
    assert (still.shows("i1"), still.shows()) == ("b.......", "bcde....")
    right(still)
    still.kill_qemu()
    still("revert web1 i1 --discard --stopped")
    assert still.shows() == "b......."
    still.sound()


@pytest.mark.parametrize("way", ["commit", "pull", "reflink", "auto"])
def test_a_tip_that_has_one_stays_on_what_it_stands_on(layered: Still, way: str) -> None:
    """Pulled up, or committed, the internal snapshot would show other data."""
    said = layered(f"delete web1 s2 --merge {way}")
    assert "s2" not in layered.names() and said.out
    whole(layered, "s2")
    assert layered.disk() == "vda.s2.qcow2" and len(layered.show()["layers"]) == 3
    layered("delete web1 i3")
    whole(layered, "s2", "i3")


def test_pulled_up_as_asked_the_lower_file_stays_for_its_internal_one(layered: Still) -> None:
    layered("delete web1 i2 i3")
    layered("delete web1 s1 --merge pull")
    whole(layered, "i2", "i3", "s1")
    assert "vda.qcow2" not in layered.opened() and layered.chain("i1") == ["vda.qcow2"]
    assert layered.show()["pending"] == []
    layered("delete web1 i1")
    whole(layered, "i1", "i2", "i3", "s1")
    assert any("vda.qcow2 back when the machine has stopped" in each for each in layered.show()["pending"])
    layered("stop web1 --force")
    assert layered.chain() == ["vda.s2.qcow2", "vda.qcow2"] and layered.show()["pending"] == []


# ---- going elsewhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["i1", "i2"])
def test_a_branch_grows_out_of_one_while_it_runs(layered: Still, name: str) -> None:
    layered(f"branch web1 new --from {name}")
    whole(layered, new=KEPT[name])
    layered.write("......x")
    layered("switch web1 new")
    assert layered.show()["state"] == "paused"
    layered.write(".......n")
    whole(layered, main="bjjj..x.", new=f"{KEPT[name][:7]}n")


def test_a_branch_grows_out_of_the_tip_while_it_writes(layered: Still) -> None:
    layered("branch web1 new --from i3")
    layered.write("......x")
    whole(layered, new=KEPT["i3"], main="bjjj..x.")


def test_going_back_within_the_tip_and_below(layered: Still) -> None:
    """The machine is started again; the work of now is parked as an internal point, or in its own file."""
    layered("revert web1 i3")
    assert layered.show()["state"] == "paused" and layered.disk() == "vda.s2.qcow2"
    parked = layered.names()["main.1"]["tips"]["vda"]
    assert parked["internal"] == "main.1" and parked["path"].endswith("vda.s2.qcow2")
    layered.write(".......x")
    main = {"main.1": KEPT["main"], "main": "bjji...x"}
    whole(layered, **main)
    layered("revert web1 i1")
    main |= {"main.2": "bjji...x", "main": "bi......"}
    whole(layered, **main)
    layered("switch web1 main.1")
    whole(layered, **main)
    layered("delete web1 --branch main.2")
    del main["main.2"]
    whole(layered, **main)
    layered("revert web1 i3 --discard --delete")
    assert set(layered.names()) == {*KEPT, "main.1"} - {"i3"}
    assert layered.shows("main.1") == KEPT["i3"] and layered.shows() == "bi......"
    right(layered)


# ---- killed -------------------------------------------------------------------------------------------------------


def at_word(number: int, *, after: bool = False) -> Callable[[Callable[[], None]], None]:
    """Be killed just before, or just after, the n-th command is said to QEMU."""

    def arrange(kill: Callable[[], None]) -> None:
        execute, said = QmpSession.execute, itertools.count(1)

        async def executed(self: QmpSession, command: str, **arguments: Any) -> Any:
            mine = next(said) == number
            if mine and not after:
                kill()
            answer = await execute(self, command, **arguments)
            if mine:
                kill()
            return answer

        setattr(QmpSession, "execute", executed)  # noqa: B010

    return arrange


def at_entry(number: int) -> Callable[[Callable[[], None]], None]:
    """Be killed just after the n-th entry in the journal."""

    def arrange(kill: Callable[[], None]) -> None:
        count = itertools.count(1)
        for name in ("take", "record", "note", "claim", "end"):
            real = getattr(Journal, name)

            def entered(self: Journal, *words: Any, real: Callable[..., None] = real) -> None:
                real(self, *words)
                if next(count) == number:
                    kill()

            setattr(Journal, name, entered)

    return arrange


def test_qemu_died_when_it_had_taken_one_of_two() -> None:
    """What is not there on all disks is there on none."""
    with standing(3, raw=True) as still:
        still.killed("snapshot web1 s1 --internal", partial(cutting, before=True))
        still.kill_qemu()
        images.run("qemu-img", "snapshot", "-c", "s1", still.disks / "vda.qcow2")
        still("recover web1")
        assert still.tags() == {} and set(still.names()) == {"main"}
        assert {still.shows(disk=disk) for disk in still.targets} == {"b......."}
        assert still.files() == {"vda.qcow2", "vdb.qcow2", "vdc.raw"}
        right(still)
        still("start web1")
        still("snapshot web1 s1 --internal")
        assert still.tags() == {"vda.qcow2": {"s1"}, "vdb.qcow2": {"s1"}}


Arrange: TypeAlias = Callable[[Callable[[], None]], None]


class Places:
    """Where to be killed, one place after the other, until it is not reached: ``died`` says whether the last was.

    :param every: so many commands to QEMU lie between two of them.
    """

    def __init__(self, every: int) -> None:
        self.every, self.died = every, True

    def __iter__(self) -> Iterator[Arrange]:
        kinds = ((at_entry, (self.every + 4) // 5), (at_word, self.every), (partial(at_word, after=True), self.every))
        for kind, step in kinds:
            for number in itertools.count(1, step):
                self.died = True
                yield kind(number)
                if not self.died:
                    break


LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("every", [19, pytest.param(1, marks=LONG)])
@pytest.mark.parametrize("also", ["", "qemu"])
def test_killed_while_internal_and_external_points_are_taken(also: str, every: int) -> None:
    """They are there on all disks or on none; what is written afterwards is kept."""
    with standing(2, raw=True) as still:
        taken, lost, main = dict[str, str](), 0, ["b.......", "b......."]
        places = Places(every)
        for number, arrange in enumerate(places):
            name, letter = f"s{number}", "cdefghij"[number % 8]
            shown = main[0]
            died = places.died = dies(partial(still, f"snapshot web1 {name} --internal"), arrange)
            main = [f"{each[:1]}{letter}{each[2:]}" for each in main]
            for disk in still.targets:
                still.write(f".{letter}", disk)
            if also:
                still.kill_qemu()
            still("recover web1")
            there = name in still.names()
            assert there or died
            taken |= {name: shown} if there else {}
            lost += not there
            for disk, word in zip(still.targets, main, strict=True):
                assert still.shows(disk=disk) == word
                for each, held in taken.items():
                    assert still.shows(each, disk) == held, (each, disk, arrange)
            right(still)
            tried("internal snapshot taken", "both are killed" if also else "snaptree is killed", int(died))
            if also:
                still("start web1")
            if len(taken) > 6:
                gone = sorted(taken)[:5]
                still(f"delete web1 {' '.join(gone)}")
                taken = {each: held for each, held in taken.items() if each not in gone}
        assert lost > 3 and taken


@pytest.mark.parametrize(
    ("place", "also", "every"),
    [
        ("tip", "qemu", 29),
        ("below", "", 47),
        *(pytest.param(place, also, 1, marks=LONG) for place in ("tip", "below") for also in ("", "qemu")),
    ],
)
def test_killed_while_one_is_deleted(place: str, also: str, every: int) -> None:
    with standing() as still:
        gone, kept = 0, 0
        places = Places(every)
        for number, arrange in enumerate(places):
            if not number % 12:
                still("delete web1 s1") if number and place == "below" else None
                for each in range(number, number + 12):
                    still.write(".cdefghij"[each % 8 + 1].rjust(2, "."))
                    still(f"snapshot web1 i{each} --internal")
                wanted = {each: still.shows(each) for each in still.names()}
                if place == "below":
                    still("snapshot web1 s1")
                    wanted["s1"] = still.shows()
                still.write("..x")
                wanted["main"] = still.shows()
            died = places.died = dies(partial(still, f"delete web1 i{number}"), arrange)
            letter = "klmnopqr"[number % 8]
            still.write(f"...{letter}")
            wanted["main"] = f"{wanted['main'][:3]}{letter}{wanted['main'][4:]}"
            if also:
                still.kill_qemu()
            still("recover web1")
            there = f"i{number}" in still.names()
            assert died or not there
            gone, kept = gone + (not there), kept + there
            if not there:
                del wanted[f"i{number}"]
            assert {each: still.shows(each) for each in still.names()} == wanted
            right(still)
            tried("internal snapshot deleted", "both are killed" if also else "snaptree is killed", int(died))
            if also:
                still("start web1")
        assert gone > 2 and kept
