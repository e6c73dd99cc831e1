"""Random operations on a simulated machine that runs, is stopped and started: internal and external points, all shapes.

``SNAPTREE_LIVE_PLANS`` says how many operations, ``SNAPTREE_SEED`` with which seed.
"""

from __future__ import annotations

from collections import Counter

from msgspec.structs import replace
from tests.kit.simulated import survey
from tests.planning.test_random_plans import Journey, travel

from snaptree.model.live import Live
from snaptree.model.survey import Survey
from snaptree.planning.adopt import DetachRequest
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.naming import put_back
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.verbs import Request

LIVE = ("live-snapshot", "live-open", "live-merge", "live-swap", "live-settle")


class LiveJourney(Journey):
    """A machine that mostly runs. What QEMU has open it alone writes to: the simulated files see to that."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.reopens = self.chance.random() < 0.7
        self.kinds: Counter[str] = Counter()

    def surveyed(self, request: Request) -> Survey:
        found, runs = super().surveyed(request), self.chance.random() < 0.8
        self.runner.stop()
        # To go elsewhere a machine is turned off.
        if not runs or isinstance(request, RevertRequest | SwitchRequest | DetachRequest):
            self.story[-1] += " (off)"
            return found
        self.runner.start()
        tree = self.runner.tree
        opened = frozenset(each.id for tip in tree.active_branch.tips.values() for each in tree.chain(tip.layer))
        known = opened if self.reopens else frozenset()
        live = Live("running", 1, opened, frozenset({"blockdev-reopen"}), known)
        return replace(found, running=True, live=live)

    def _expect(self, request: Request, planned: Plan, first: Plan | None) -> None:
        super()._expect(request, planned, first)
        if first is not None and self.runner.open:
            inner = " internal" if isinstance(request, SnapshotRequest) and request.internal else ""
            self.kinds.update({step.kind + inner for one in planned.every() for step in one.steps})

    def operate(self) -> None:
        super().operate()
        if self.chance.random() < 0.2:
            self.runner.stop()
            found = put_back(self.runner.tree, survey(self.disk, self.runner.tree, next(self.numbers)))
            if found is not None:
                self.runner.run(found)


def test_random_operations_while_it_runs_keep_everything_after_every_step() -> None:
    done: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for journey in travel(LiveJourney, "SNAPTREE_LIVE_PLANS", "8000"):
        done += journey.done
        kinds += journey.kinds
    print(dict(done), dict(kinds))
    for kind in (*LIVE, "live-snapshot internal", "delete-internal", "build-from-point"):
        assert kinds[kind] > sum(done.values()) // 2000, kinds
