"""Random operations, one after the other, on one guest that writes all the while."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from tests.kit.guest import SECONDS
from tests.kit.stage import Stage

MOST = 7
"""So many names there are at most."""


class Soak:
    """A machine with two disks whose guest writes, and what each of its names holds."""

    def __init__(self, stage: Stage, seed: int) -> None:
        stage.boot = dataclasses.replace(stage.boot, append=True)
        self.stage, self.chance = stage, random.Random(seed)
        self.held: dict[str, tuple[int, ...]] = {}
        self.memories: set[str] = set()
        self.branches: set[str] = set()
        self.active, self.number, self.commands = "main", 0, 0
        self.done: Counter[str] = Counter()

    def begin(self) -> None:
        self.stage.start(raw=self.chance.random() < 0.5)
        self.snapshot()

    def turn(self) -> None:
        """One operation; afterwards the guest goes on, and every name holds what it held."""
        verbs: list[tuple[int, Callable[[], object]]] = [
            (6, self.snapshot),
            (3, self.remember),
            (6, self.delete),
            (1, self.forget_memory),
            (2, self.revert),
            (2, self.branch),
            (3, self.switch),
            (1, self.rename),
            (1, lambda: self._run("gc web1")),
        ]
        verb = self.chance.choices([each for _, each in verbs], [weight for weight, _ in verbs])[0]
        if len(self.held) >= MOST:
            verb = self.delete
        began = time.monotonic()
        name = getattr(verb, "__name__", "gc").replace("<lambda>", "gc")
        print(f"{sum(self.done.values())}: {name}", end="", flush=True)
        verb()
        self.done[name] += 1
        try:
            self.stage.guest.writes_on(8)
        except AssertionError as error:
            raise AssertionError(f"{name}: the machine is {self.stage.show()['state']}: {error}") from error
        for each, held in self.held.items():
            assert self.stage.holds(each) == held, (each, name)
        assert {*self.held, self.active} == set(self.stage.names())
        print(f", {time.monotonic() - began:.1f} s", flush=True)

    def _run(self, line: str) -> None:
        self.stage(line)
        self.commands += 1

    # ---- the verbs ------------------------------------------------------------------------------------------------

    def _fresh(self) -> str:
        self.number += 1
        return f"n{self.number}"

    def _any(self, names: set[str]) -> str | None:
        return self.chance.choice(sorted(names)) if names else None

    @property
    def _snapshots(self) -> set[str]:
        return set(self.held) - self.branches

    def snapshot(self) -> None:
        name = self._fresh()
        self._run(f"snapshot web1 {name} {self.chance.choice(('', '', '--internal'))}")
        self.held[name] = self.stage.holds(name)

    def remember(self) -> None:
        name = self._fresh()
        self._run(f"snapshot web1 {name} --memory {self.chance.choice(('', '--internal'))}")
        self.held[name] = self.stage.holds(name)
        self.memories.add(name)

    def delete(self) -> None:
        if self.branches and (self.chance.random() < 0.3 or not self._snapshots):
            name = self._any(self.branches)
            self._run(f"delete web1 --branch {name}")
            self._gone({str(name)})
        elif self._snapshots:
            names = set(
                self.chance.sample(sorted(self._snapshots), min(len(self._snapshots), self.chance.choice((1, 1, 2, 3))))
            )
            way = self.chance.choice(("auto", "auto", "commit", "pull", "none"))
            self._run(f"delete web1 {' '.join(sorted(names))} --merge {way}")
            self._gone(names)

    def _gone(self, names: set[str]) -> None:
        for each in names:
            del self.held[each]
        self.memories -= names
        self.branches -= names

    def forget_memory(self) -> None:
        if name := self._any(self.memories & self._snapshots):
            self._run(f"delete web1 {name} --memory-only")
            self.memories.discard(name)

    def revert(self) -> None:
        if name := self._any(self._snapshots):
            words = self.chance.choice(("", "", "--discard", "--no-memory"))
            self._go(f"revert web1 {name} {words}", name, memory=name in self.memories and words != "--no-memory")

    def switch(self) -> None:
        if name := self._any(self.branches):
            words = self.chance.choice(("", "--no-memory"))
            self._go(f"switch web1 {name} {words}", name, memory=name in self.memories and not words)

    def branch(self) -> None:
        name = self._fresh()
        if source := self._any(self._snapshots):
            self._run(f"branch web1 {name} --from {source}")
            self.held[name] = self.held[source]
            self.branches.add(name)

    def rename(self) -> None:
        if old := self._any(set(self.held)):
            new = self._fresh()
            self._run(f"rename web1 {old} {new}")
            self.held[new] = self.held.pop(old)
            for names in (self.memories, self.branches):
                if old in names:
                    names.remove(old)
                    names.add(new)

    def _go(self, line: str, target: str, *, memory: bool) -> None:
        """Go elsewhere; with its memory the guest goes on, otherwise it starts anew."""
        stage, held, before = self.stage, self.held[target], self.active
        self._run(line)
        said = len(stage.guest.lines())
        shown = stage.show()
        self.active = shown["active_branch"]
        parked = {each["name"] for each in shown["branches"]} - {self.active}
        for name in parked - self.branches:
            self.held[name] = stage.holds(name)
        if before in parked:
            self.held[before] = stage.holds(before)
        self.held.pop(self.active, None)
        self.branches = parked
        self.memories = {name for name, each in stage.names().items() if each["memory"] is not None}
        until = time.monotonic() + SECONDS
        while not (told := [each for each in stage.guest.lines()[said + 1 :] if each.startswith("F ")]):
            assert time.monotonic() < until, line
            if memory:
                time.sleep(0.05)
            else:
                stage.guest.tell(f"from {held[-1]}.")
        print(f" ({line}, which holds {held}: {told[0]})", end="")
        # Memory and disks are of one instant: it goes on just where the disks end.
        assert held[-1] - 8 <= int(told[0].split()[1]) < held[-1] + 2000, (line, held, told)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("count", [12, pytest.param(220, marks=pytest.mark.slow)])
def test_random_operations_on_a_guest_that_writes(stage: Stage, count: int) -> None:
    soak = Soak(stage, seed=count)
    soak.begin()
    for number in range(count):
        soak.turn()
        if number % 10 == 9:
            stage.sound()
    stage("gc web1")
    stage.finish()
    assert sum(soak.done.values()) == count
    # A turn may find nothing to be done.
    assert soak.commands >= count * 10 // 11
    print(soak.commands, soak.done)
