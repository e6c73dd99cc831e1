"""snaptree, libvirtd or QEMU, killed at random in random operations on a domain: nothing is lost, virsh goes on.

Each is killed around something that libvirt is told, with the domain off or running. ``SNAPTREE_SEED`` is the first
seed, ``SNAPTREE_SEEDS`` how many there are.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
from tests.kit.domain import DomainScene, domain_scene
from tests.kit.libvirtd import Libvirtd, libvirtd_or_skip
from tests.kit.stage import processes_of
from tests.kit.told import run_killed
from tests.kit.walk import Walk

pytestmark = [pytest.mark.root, pytest.mark.slow]
FIRST = int(os.environ.get("SNAPTREE_SEED", "1"))
SEEDS = range(FIRST, FIRST + int(os.environ.get("SNAPTREE_SEEDS", "6")))
KILLS = 11
"""So many there are of each seed."""
VICTIMS = ("snaptree", "libvirtd", "qemu")
LEAST = 2
"""So often each of them is killed in each seed."""
CALLS = (
    "define",
    "redefine",
    "forget_record",
    "cut",
    "commit",
    "pull",
    "pivot",
    "stand_still",
    "start",
    "stop",
    "chains",
)


@pytest.fixture(scope="module")
def mortal() -> Iterator[Libvirtd]:
    """A libvirtd that comes back when it is killed."""
    with libvirtd_or_skip(lasting=True) as found:
        yield found


@pytest.fixture
def domain(mortal: Libvirtd) -> Iterator[DomainScene]:
    """An empty folder for images; no domain yet."""
    with domain_scene(mortal) as found:
        yield found


class Killing(Walk):
    """A walk on which processes are killed."""

    def __init__(self, domain: DomainScene, seed: int) -> None:
        super().__init__(domain, seed)
        self.kills: Counter[str] = Counter()

    def victim(self) -> str:
        """What was killed least often so far; QEMU only while there is one."""
        may = [each for each in VICTIMS if each != "qemu" or self.web.runs()]
        fewest = min(self.kills[each] for each in may)
        return self.chance.choice([each for each in may if self.kills[each] == fewest])

    def killed(self) -> None:
        """One operation, in which something is killed, if it comes so far."""
        web, before = self.web, self.truth
        verb, line, after = self.choose()
        who = self.victim()
        process = {"snaptree": 0, "libvirtd": web.own.process() or 0}.get(who)
        if process is None:
            (process,) = processes_of(web.folder)
        when, early = self.chance.randint(1, 7), self.chance.random() < 0.5
        self.journey.append(f"{line}: {who} is killed {'before' if early else 'after'} call {when}")
        done, told = run_killed(web, line, when, before=early, calls=CALLS, victim=process, seconds=240)
        said = done.stdout + done.stderr
        self.journey[-1] += f" ({done.returncode})"
        assert "Traceback" not in said, said
        was = bool(told)
        if not was:
            assert done.returncode == 0, said
        if was and who == "snaptree":
            assert done.returncode == -signal.SIGKILL, said
        web.own.wait()
        if was and who == "qemu":
            web.forgiven.add("leaks")
        self.run("recover @")
        self.run("gc @")
        self.check_either(before, after)
        self.done[verb] += 1
        self.kills[who] += was

    def until(self, kills: int) -> None:
        """Operations until so many have been killed, and of each some."""
        try:
            while self.kills.total() < kills or min(self.kills[each] for each in VICTIMS) < LEAST:
                self.power()
                self.write()
                self.killed()
                if self.chance.random() < 0.4:
                    self.virsh_and_repair()
        except BaseException as error:
            error.add_note("\n".join(self.journey))
            raise


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_random(domain: DomainScene, seed: int) -> None:
    walk = Killing(domain, seed)
    walk.until(KILLS)
    print(f"seed {seed}: {walk.kills}")
    assert walk.kills.total() >= KILLS and all(walk.kills[each] >= LEAST for each in VICTIMS), walk.kills
