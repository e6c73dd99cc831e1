"""Random operations over random trees on real images; everything that is kept is compared after every operation.

By default some 90 operations; ``SNAPTREE_OPERATIONS`` says how many, ``SNAPTREE_SEED`` with which seed to begin. What
was run is kept in ``build/random-operations.json``, so that a later run goes on with other seeds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from tests.kit import images
from tests.kit.images import GiB, KiB, MiB
from tests.kit.space import mounted
from tests.kit.world import World, hidden_files, jobs_of

from snaptree.errors import RefusedError, SnaptreeError, UsageError
from snaptree.images.facts import read_facts
from snaptree.machines.options import DiskOption
from snaptree.planning.adopt import DetachRequest
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.settle import loose_layers
from snaptree.planning.steps import Cover, Move
from snaptree.planning.sweep import SquashRequest
from snaptree.planning.verbs import DeleteBranchRequest, GcRequest, RenameRequest, Request

KEPT = Path(__file__).parents[2] / "build" / "random-operations.json"
DISKS = ("vda", "vdb", "vdc")
DONE: Counter[str] = Counter()
COMPARED: Counter[str] = Counter()
"""How often what was foretold has been compared with what was moved, by how it was found out."""
JOURNEY: list[str] = []
PLACE: Path | None = None
"""Where the images are; None for where temporary files usually are."""


class RandomOperations(RuleBasedStateMachine):
    """One machine with one to three disks, and everything that can be done with it while it is off."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="snaptree-test-", dir=PLACE))
        self.world = World(self.folder)
        self.numbers = iter(range(1, 10_000))
        self.random = random.Random(0)
        JOURNEY.clear()

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- the beginning --------------------------------------------------------------------------------------------

    @initialize(
        count=st.integers(1, 3),
        roots=st.lists(st.sampled_from(["qcow2", "raw", "golden", "golden-raw", "chain"]), min_size=3, max_size=3),
        clusters=st.lists(st.sampled_from([4, 16, 64, 64, 512, 2048]), min_size=3, max_size=3),
        kinds=st.lists(st.sampled_from(["plain", "plain", "plain", "old", "extended"]), min_size=3, max_size=3),
        adopt=st.booleans(),
        salt=st.integers(0, 1 << 30),
    )
    def begin(
        self, count: int, roots: list[str], clusters: list[int], kinds: list[str], adopt: bool, salt: int
    ) -> None:
        self.random = random.Random(salt)
        disks = {}
        for disk, root, cluster, kind in zip(DISKS[:count], roots, clusters, kinds, strict=False):
            disks[disk] = self._disk(disk, root, cluster, kind, adopt=adopt)
        JOURNEY.append(f"add {roots[:count]} clusters {clusters[:count]} {kinds[:count]} adopt={adopt} salt={salt}")
        self.world.add(disks, adopt=adopt)
        self._checked("add")

    def _disk(self, disk: str, root: str, cluster: int, kind: str, *, adopt: bool) -> tuple[Path, str]:
        folder, size = self.world.images, self.random.choice([2, 4, 6]) * MiB
        options: dict[str, Any] = {"cluster_size": cluster * KiB}
        if kind == "old":
            options["compat"] = "0.10"
        elif kind == "extended":
            options = {"cluster_size": max(cluster, 16) * KiB, "extended_l2": "on"}
        if root == "raw":
            path = images.create(folder / f"{disk}.img", size, "raw")
            self._fill(path, "raw", size)
            return path, "raw"
        if root == "qcow2":
            path = images.create(folder / f"{disk}.qcow2", size, **options)
            self._fill(path, "qcow2", size)
            return path, "qcow2"
        form = "raw" if root == "golden-raw" else "qcow2"
        base = images.create(folder / f"{disk}-base.{form}", size, form, **(options if form == "qcow2" else {}))
        self._fill(base, form, size)
        below: tuple[Path, str] = (base, form)
        if root == "chain":
            longer = self.random.choice([2, 4, 6]) * MiB
            middle = images.create(folder / f"{disk}-middle.qcow2", longer, backing=below)
            self._fill(middle, "qcow2", longer)
            below = (middle, "qcow2")
        size = self.random.choice([2, 4, 6]) * MiB
        top = images.create(folder / f"{disk}.qcow2", size, backing=below, **options)
        self._fill(top, "qcow2", size)
        if not adopt:
            for path in folder.glob(f"{disk}-*"):
                self.world.foreign[path] = path.read_bytes()
        return top, "qcow2"

    def _fill(self, path: Path, form: str, size: int) -> None:
        images.io(path, form, *self._commands(size))

    def _commands(self, size: int) -> list[str]:
        commands = []
        for _ in range(self.random.randint(1, 5)):
            unit = self.random.choice([512, 4 * KiB, 64 * KiB, 256 * KiB])
            length = min(unit * self.random.randint(1, 6), size)
            start = self.random.randrange(0, size - length + 1) // 512 * 512
            byte = self.random.randint(1, 255)
            kind = self.random.choice(["write -P", "write -P", "write -P", "write -z", "write -z -u", "discard"])
            commands.append(f"{kind} {byte} {start} {length}" if kind == "write -P" else f"{kind} {start} {length}")
        return commands

    # ---- helpers --------------------------------------------------------------------------------------------------

    def _name(self, kind: str) -> str:
        return f"{kind}{next(self.numbers)}"

    def _do(self, request: Request, *, may_refuse: tuple[type[SnaptreeError], ...] = ()) -> None:
        world = self.world
        JOURNEY.append(repr(request))
        try:
            plan = world.machine.plan(request)
        except may_refuse as error:
            assert error.message
            return
        self._cheapest(plan, request)
        pulled = self._pulled_before(plan)
        count = len(world.machine.log())
        done = world.run(request)
        assert done.public()["bytes_to_copy"] == plan.public()["bytes_to_copy"]
        self._foretold(done, pulled, count)
        self._checked(type(request).__name__.removesuffix("Request"))

    def _checked(self, what: str) -> None:
        DONE[what] += 1
        self.world.check()
        assert not hidden_files(self.folder)

    def _cheapest(self, plan: Plan, request: Request) -> None:
        """The chosen way is never dearer than another one that is allowed."""
        if not isinstance(request, DeleteRequest | SquashRequest) or request.merge != "auto" or len(plan.then) > 1:
            return
        if len(jobs_of(plan)) != 1:
            return
        for way in ("commit", "pull"):
            other = _planned(self.world, request, way)
            if other is None or len(other.end.layers) > len(plan.end.layers):
                continue  # It would leave the lower file, which an internal snapshot needs.
            if len(jobs_of(other)) == 1 and "as --merge pull asks" not in str(other.public()):
                assert plan.total_bytes <= other.total_bytes, f"{way} would copy {other.total_bytes}"

    def _zero_data(self, path: str, lower: list[tuple[int, int]]) -> int:
        """How much of the lower layers' data is nothing but zeroes: QEMU pulls it as zero clusters, without data."""
        shown = images.read(path)
        unit = 2 * KiB
        units = {at for start, length in lower for at in range(start // unit, -(-(start + length) // unit))}
        large = images.info(path)["cluster-size"] // unit
        # A cluster is pulled as zeroes when all of it is.
        return sum(
            large * unit
            for cluster in {at // large for at in units}
            if not any(shown[cluster * large * unit : (cluster + 1) * large * unit])
        )

    def _pulled_before(self, plan: Plan) -> dict[str, tuple[int, list[tuple[int, int]]]]:
        """What each file that data is pulled into has of its own, and the lower ones, where only one merge is made."""
        jobs = jobs_of(plan)
        if len(jobs) != 1 or jobs[0].way != "pull":
            return {}
        lower = [extent for layer in jobs[0].row[:-1] for extent in images.own_extents(*layer)]
        return {jobs[0].row[-1][0]: (images.own_data(*jobs[0].row[-1]), lower)}

    def _foretold(self, plan: Plan, pulled: dict[str, tuple[int, list[tuple[int, int]]]], count: int) -> None:
        """What was foretold is what was moved."""
        merges = [each for each in plan.every() if each.way]
        entries = [
            each for each in self.world.machine.log()[count:] if each.bytes or each.operation in ("merge", "squash")
        ]
        entries = [each for each in entries if each.operation in ("merge", "squash")]
        if len(merges) == len(entries):
            for merge, entry in zip(merges, entries, strict=True):
                # The cluster in which a shorter layer ends is copied into the top before the rest is moved.
                room = 2 * MiB * sum(isinstance(step, Cover) for step in merge.steps)
                wanted = merge.bytes_to_copy
                # To XFS, blocks that it has reserved in a raw file are data while they are in the page cache.
                rows = [job.row[0][1] for step in merge.steps if isinstance(step, Move) for job in step.jobs]
                least = 0 if PLACE is not None and "raw" in rows else wanted
                assert least <= entry.bytes <= wanted + room, f"foretold {wanted}, moved {entry.bytes}"
                COMPARED["merges, by what QEMU counted"] += 1
        for path, (before, lower) in pulled.items():
            job = jobs_of(plan)[0]
            after = next(each for each in (path, job.row[0][0]) if Path(each).exists())
            moved = images.own_data(after) - before
            COMPARED["pulls, by what the file has more"] += 1
            zero = self._zero_data(after, lower)
            if job.row[0][1] == "raw":
                # To a stream all of a raw file is data but chunks of 512 KiB that are all zero.
                zero += 512 * KiB * (len(lower) + 1)
            if any(isinstance(step, Cover) for each in plan.every() for step in each.steps) and job.by_qemu:
                continue  # A top of version 2 has the zeroes written out that it shows past the end of shorter layers.
            cut = 2 * MiB * any(isinstance(step, Cover) for each in plan.every() for step in each.steps)
            # What lies past the disk's end in its last cluster is moved with it, and not told by QEMU.
            top = read_facts(after, "qcow2")
            past = -top.virtual_size % top.cluster_size
            least = 0 if PLACE is not None and "raw" in [form for _, form in job.row] else job.bytes - zero - past
            assert least <= moved <= job.bytes + cut, f"foretold {job.bytes}, pulled {moved} into {path}"

    def _snapshots(self) -> list[str]:
        return sorted(self.world.tree.snapshots)

    # ---- what can be done -----------------------------------------------------------------------------------------

    def _possible(self) -> list[Callable[[st.DataObject], None]]:
        """What can be done now, as often as it is to be likely.

        As rules of their own two of five were a ``gc`` with nothing to do, and two of a hundred deletions.
        """
        tree = self.world.tree
        found: list[Callable[[st.DataObject], None]] = [self.write] * 4
        found += [self.resize, self.rename, self.verify, self.squash]
        if len(tree.snapshots) < 9:
            found += [self.snapshot] * 5
        if len(tree.branches) < 6:
            found += [self.branch] * 2
        if tree.snapshots:
            found += [self.delete] * 5 + [self.revert] * 3
        if len(tree.branches) > 1:
            found += [self.delete_branch, self.delete_branch, self.switch, self.switch]
        if len(tree.disks) > 1:
            found.append(self.detach)
        if len(tree.disks) < 3:
            found.append(self.attach)
        if loose_layers(tree):
            found += [self.gc, self.squash, self.squash]
        return found

    @rule(data=st.data())
    def something(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self._possible()))(data)

    def write(self, data: st.DataObject) -> None:
        disk = data.draw(st.sampled_from(self.world.tree.disks))
        size = len(self.world.truth[self.world.active][disk])
        commands = self._commands(size)
        JOURNEY.append(f"write {disk} {commands}")
        self.world.write(disk, *commands)

    def resize(self, data: st.DataObject) -> None:
        disk = data.draw(st.sampled_from(self.world.tree.disks))
        size = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
        path, form = self.world.tip(disk)
        if form == "qcow2":
            # QEMU neither shrinks an image with internal snapshots nor always grows one of version 2.
            facts = images.info(path)
            shorter = size * MiB < facts["virtual-size"]
            if shorter and facts.get("snapshots"):
                return
            if not shorter and facts["format-specific"]["data"]["compat"] == "0.10":
                return
        JOURNEY.append(f"resize {disk} {size} MiB")
        images.run("qemu-img", "resize", "-q", "-f", form, "--shrink", path, str(size * MiB))
        self.world.reread(disk)

    def snapshot(self, data: st.DataObject) -> None:
        disks = self.world.tree.disks
        exclude: tuple[str, ...] = ()
        if len(disks) > 1 and data.draw(st.booleans()):
            exclude = (data.draw(st.sampled_from(disks)),)
        self._do(SnapshotRequest(self._name("s"), data.draw(st.booleans()), exclude))

    def delete(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(self._snapshots()), min_size=1, max_size=2, unique=True))
        merge = data.draw(st.sampled_from(["auto", "auto", "auto", "none", "commit", "pull", "reflink"]))
        children = data.draw(st.sampled_from(["", "", "", "children", "only"]))
        with_branches = data.draw(st.sampled_from([False, False, True]))
        self._do(DeleteRequest(tuple(names), merge, children == "children", children == "only", with_branches))

    def delete_branch(self, data: st.DataObject) -> None:
        names = sorted(set(self.world.tree.branches) - {self.world.active})
        merge = data.draw(st.sampled_from(["auto", "none", "pull", "reflink"]))
        self._do(DeleteBranchRequest(data.draw(st.sampled_from(names)), merge))

    def revert(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self._snapshots()))
        discard, keep_as, delete, children = (data.draw(st.booleans()) for _ in range(4))
        kept = self._name("k") if keep_as and not discard else None
        self._do(RevertRequest(name, discard, kept, delete, children and discard))

    def branch(self, data: st.DataObject) -> None:
        source = data.draw(st.none() | st.sampled_from(snapshots)) if (snapshots := self._snapshots()) else None
        self._do(BranchRequest(self._name("b"), source))

    def switch(self, data: st.DataObject) -> None:
        names = sorted(set(self.world.tree.branches) - {self.world.active})
        self._do(SwitchRequest(data.draw(st.sampled_from(names))))

    def rename(self, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from(sorted(self.world.truth)))
        self._do(RenameRequest(old, self._name("n")))

    def squash(self, data: st.DataObject) -> None:
        disk = data.draw(st.sampled_from(self.world.tree.disks))
        layers = sorted(layer.path for layer in self.world.tree.layers.values() if layer.disk == disk)
        top = data.draw(st.none() | st.sampled_from(layers))
        merge = data.draw(st.sampled_from(["auto", "commit", "pull", "reflink"]))
        self._do(SquashRequest(disk, top, None, merge), may_refuse=(RefusedError,))

    def gc(self, data: st.DataObject) -> None:
        self._do(GcRequest())

    def detach(self, data: st.DataObject) -> None:
        target = data.draw(st.sampled_from(self.world.tree.disks))
        before = {layer.path for layer in self.world.tree.layers.values()}
        self._do_detach(DetachRequest(target, data.draw(st.booleans())), before)

    def _do_detach(self, request: DetachRequest, before: set[str]) -> None:
        JOURNEY.append(repr(request))
        plan = self.world.machine.plan(request)
        if not request.delete_files:
            after = {layer.path for layer in plan.after.layers.values()}
            self.world.extra |= {path for path in before - after if Path(path) not in self.world.foreign}
        self.world.run(request)
        self._checked("Detach")

    def attach(self, data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(["qcow2", "raw"]))
        used = {layer.disk for layer in self.world.tree.layers.values()}
        target = f"vd{'abcdefghijklmnopqrstuvwxyz'[len(used) % 20 + 3]}"
        if target in used:
            return
        path = images.create(self.world.images / f"{target}-{next(self.numbers)}.{kind}", 2 * MiB, kind)
        self._fill(path, kind, 2 * MiB)
        option = DiskOption(target, str(path), kind)
        self._do(self.world.machine.attach_request(option))

    def verify(self, data: st.DataObject) -> None:
        found = self.world.machine.verify()
        assert not [each for each in found if each.severity == "error"], found
        DONE["Verify"] += 1


def _planned(world: World, request: DeleteRequest | SquashRequest, way: str) -> Plan | None:
    from msgspec.structs import replace

    try:
        return world.machine.plan(replace(request, merge=way))
    except (RefusedError, UsageError):
        return None


def _kept() -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(KEPT.read_text())
    except (OSError, ValueError):
        return []
    return found


def _run(operations: int, steps: int, folder: Path) -> None:
    """Run seed after seed until there have been so many operations.

    Every other seed is on XFS, whose files share blocks; of the others every other one leaves all merges to QEMU.
    """
    with mounted(folder, "xfs", 3 * GiB) as xfs:
        _run_on(operations, steps, xfs)


def _run_on(operations: int, steps: int, xfs: Path) -> None:
    global PLACE
    kept = _kept()
    number = int(os.environ.get("SNAPTREE_SEED", "0") or "0") or max((each["seed"] for each in kept), default=0) + 1
    done = 0
    phases = [Phase.generate, *([Phase.shrink] if os.environ.get("SNAPTREE_SHRINK") else [])]
    while done < operations:
        DONE.clear()
        COMPARED.clear()
        how = settings(
            max_examples=4,  # the first is the simplest there is: it tells little
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=phases,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        )
        mismatch = ""
        PLACE = xfs if number % 2 else None
        os.environ["SNAPTREE_MOVER"] = "qemu" if number % 4 == 2 else ""
        try:
            run_state_machine_as_test(seed(number)(RandomOperations), settings=how)
        except BaseException as error:
            mismatch = f"{type(error).__name__}: {error}"
            print(f"seed {number}:\n  " + "\n  ".join(JOURNEY))
            raise
        finally:
            done += sum(DONE.values())
            counts = {"operations": dict(sorted(DONE.items())), "compared": dict(sorted(COMPARED.items()))}
            kept.append({"seed": number, **counts, "mismatch": mismatch})
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(kept, indent=1))
        number += 1


@pytest.mark.timeout(900)
def test_random_operations_keep_every_byte(tmp_path: Path) -> None:
    _run(int(os.environ.get("SNAPTREE_OPERATIONS", "90")), 30, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_three_thousand_random_operations_keep_every_byte(tmp_path: Path) -> None:
    _run(3000, 50, tmp_path)
