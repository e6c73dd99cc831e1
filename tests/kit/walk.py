"""A walk over a domain's tree: random operations of snaptree's and of virsh's, and what every name must show."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from tests.kit.domain import DomainScene, VirshRefusal, left_behind
from tests.kit.scene import Said, names_in, points_of, word_of

DISKS = ("vda", "vdb")
SLOTS = 8
MOST = 7
"""With more names than this, names go."""
Words = dict[str, str]
"""What each disk shows."""


@dataclass(frozen=True)
class Truth:
    """What all names but the active branch's show, what the machine shows, and what a new parked branch may show."""

    kept: dict[str, Words]
    here: Words
    parks: Words | None = None

    def without(self, *names: str) -> Truth:
        return replace(self, kept={name: words for name, words in self.kept.items() if name not in names})

    def plus(self, name: str, words: Words) -> Truth:
        return replace(self, kept={**self.kept, name: words})


class Walk:
    """A domain with two disks.

    :param runs: whether it runs at times.
    """

    def __init__(self, domain: DomainScene, seed: int, *, runs: bool = True) -> None:
        self.web = domain
        self.chance = random.Random(seed)
        self.truth = Truth({}, dict.fromkeys(DISKS, "." * SLOTS))
        self.done: Counter[str] = Counter()
        """snaptree's operations."""
        self.by_virsh: Counter[str] = Counter()
        """What virsh did."""
        self.refused = 0
        """How often virsh did not."""
        self.journey: list[str] = []
        self.number = 0
        self.may_run = runs
        domain.define("vda=web.qcow2", "vdb=data.qcow2")

    def name(self, kind: str) -> str:
        self.number += 1
        return f"{kind}{self.number}"

    def write(self) -> None:
        """The guest writes."""
        for disk in self.chance.sample(DISKS, self.chance.randint(0, 2)):
            at, letter = self.chance.randrange(SLOTS), self.chance.choice("abcdefghijklmnop")
            self.journey.append(f"write {letter} at {at} of {disk}")
            self.web.write("." * at + letter, disk)
            before = self.truth.here[disk]
            self.truth = replace(self.truth, here={**self.truth.here, disk: before[:at] + letter + before[at + 1 :]})

    def power(self) -> None:
        """The domain is started or turned off."""
        state = self.chance.choice(["off", "running"]) if self.may_run else "off"
        if self.web.runs() != (state == "running"):
            self.journey.append(state)
            self.web.be(state)

    # ---- snaptree's -----------------------------------------------------------------------------------------------

    def choose(self) -> tuple[str, str, Truth]:
        """An operation of snaptree's: its verb, the command, and what holds after it."""
        shown, truth = self.web.show(), self.truth
        runs = shown["state"] != "off"
        snapshots = [each["name"] for each in shown["snapshots"]]
        parked = [each["name"] for each in shown["branches"] if not each["active"]]
        # What is worked on forks where it stands only while the domain is off.
        verbs = ["snapshot", "snapshot"] + ["branch"] * bool(snapshots or not runs)
        verbs += ["delete", "revert", "revert", "rename"] * bool(snapshots) + ["switch", "drop"] * bool(parked)
        if len(truth.kept) > MOST:
            verbs = ["delete"] * bool(snapshots) + ["drop"] * bool(parked)
        verb = self.chance.choice(verbs)
        if verb == "snapshot":
            name = self.name("s")
            kinds = ["", "", "", " --internal"] + ([" --internal", " --memory", " --memory"] if runs else [])
            return verb, f"snapshot @ {name}{self.chance.choice(kinds)}", truth.plus(name, truth.here)
        if verb == "branch":
            name, source = self.name("b"), self.chance.choice([*([None] if not runs else []), *snapshots])
            if source is None:
                return verb, f"branch @ {name}", truth.plus(name, truth.here)
            return verb, f"branch @ {name} --from {source}", truth.plus(name, truth.kept[source])
        if verb == "delete":
            gone = self.chance.sample(snapshots, self.chance.randint(1, min(2, len(snapshots))))
            way = self.chance.choice(["auto", "auto", "commit", "pull", "none"])
            return verb, f"delete @ {' '.join(gone)} --merge {way}", truth.without(*gone)
        if verb == "drop":
            name = self.chance.choice(parked)
            return verb, f"delete @ --branch {name}", truth.without(name)
        if verb == "rename":
            name, new = self.chance.choice(snapshots), self.name("r")
            return verb, f"rename @ {name} {new}", truth.without(name).plus(new, truth.kept[name])
        if verb == "revert":
            name = self.chance.choice(snapshots)
            options = self.chance.choice(["", "", " --discard", " --discard --delete"])
            after = replace(truth, here=truth.kept[name], parks=None if options else truth.here)
            return verb, f"revert @ {name}{options}", after.without(name) if "delete" in options else after
        name = self.chance.choice(parked)
        after = replace(truth, here=truth.kept[name]).without(name).plus(shown["active_branch"], truth.here)
        return verb, f"switch @ {name}", after

    def snaptree(self) -> None:
        """snaptree does something."""
        verb, line, after = self.choose()
        self.journey.append(line)
        self.web(line)
        self.truth = after
        self.done[verb] += 1

    def run(self, line: str) -> Said:
        """snaptree does just this."""
        self.journey.append(line)
        return self.web(line)

    # ---- virsh's --------------------------------------------------------------------------------------------------

    def virsh(self) -> None:
        """virsh does something."""
        shown, truth = self.web.show(), self.truth
        tips = {each["path"] for each in shown["disks"]}
        named = {name: points_of(each) for name, each in names_in(shown).items()}
        verb = self.chance.choice(["create", "revert", "delete", "delete"])
        names = sorted(truth.kept)
        if verb == "create" or not names:
            name = self.name("v")
            self.journey.append(f"virsh create {name}")
            self.web.virsh("snapshot-create-as", "@", name, "--disk-only")
            verb, self.truth = "create", truth.plus(name, truth.here)
        elif verb == "revert":
            name = self.chance.choice(names)
            if any(each["internal"] and each["path"] not in tips for each in named[name].values()):
                return
            if any(each["internal"] not in (None, name) for each in named[name].values()):
                # A rename says that the images go on calling it by its old name, and that virsh asks for that.
                return
            self.journey.append(f"virsh revert {name}")
            self.web.back(name)
            self.truth = replace(truth, here=truth.kept[name])
        else:
            name = self.chance.choice(names)
            self.journey.append(f"virsh delete {name}")
            try:
                self.web.virsh("snapshot-delete", "@", name)
            except VirshRefusal as error:
                self.journey[-1] += f": {error}"
                self.refused += 1
                return
            self.truth = truth.without(name)
        self.by_virsh[verb] += 1

    # ---- what must hold -------------------------------------------------------------------------------------------

    def found(self) -> Truth:
        """What all names show now."""
        shown = self.web.show()
        read: dict[tuple[str, str | None], str] = {}

        def words(points: Any) -> Words:
            for each in points.values():
                place = (each["path"], each["internal"])
                if place not in read:
                    read[place] = word_of(self.web.unlocked(*place, shown))
            return {disk: read[each["path"], each["internal"]] for disk, each in points.items()}

        named = {name: words(points_of(each)) for name, each in names_in(shown).items()}
        here = named.pop(shown["active_branch"])
        for disk in shown["disks"]:
            assert str(self.web.source(disk["target"])[0]) == disk["path"], "libvirt starts it with another file"
        return Truth(named, here)

    def check(self, *, sound: bool) -> None:
        """What is there is what must be."""
        found, truth = self.found(), self.truth
        assert found.here == truth.here, f"shows {found.here}, not {truth.here}"
        new = set(found.kept) - set(truth.kept)
        assert all(words == truth.parks for name, words in found.kept.items() if name in new), f"{new} are new"
        assert not (gone := set(truth.kept) - set(found.kept)), f"{gone} are gone"
        other = {name: (found.kept[name], words) for name, words in truth.kept.items() if found.kept[name] != words}
        assert not other, f"others show now what they did not: {other}"
        self.truth = found
        if sound:
            self.web.sound()

    def check_either(self, before: Truth, after: Truth) -> None:
        """An operation was killed: all that both have is there, and what is there is of one of them."""
        found = self.found()
        assert found.here in (before.here, after.here)
        assert set(before.kept) & set(after.kept) <= set(found.kept)
        for name, words in found.kept.items():
            may: list[Words | None] = [truth.kept[name] for truth in (before, after) if name in truth.kept]
            assert words in (may or [after.parks]), f"{name} shows {words}"
        if found.here != before.here and after.parks is not None:
            assert before.here in found.kept.values(), "what was worked on is lost"
        self.truth = found
        self.web.sound()

    def virsh_and_repair(self) -> None:
        """One operation of virsh's, after which the records are put right."""
        self.write()
        self.virsh()
        self.check(sound=False)
        self.run("verify @ --repair")
        left_behind(self.web)
        self.check(sound=True)

    def virsh_alone(self) -> None:
        """One operation of virsh's; the next of snaptree's finds the records as that has left them."""
        self.write()
        self.virsh()
        self.check(sound=False)
        left_behind(self.web)

    def operations(self) -> int:
        """How many there have been, snaptree's and virsh's; none that was refused, and no starting and stopping."""
        return self.done.total() + self.by_virsh.total()

    def go(self, steps: int, *, least: int = 0, virsh: Collection[str] = ()) -> None:
        """So many operations of snaptree's, and of virsh's about half as often; after half of these the records are
        put right, the others snaptree's next operation goes on from.

        :param least: it goes on until there have been so many operations,
        :param virsh: and virsh has done each of these.
        """
        try:
            while steps > 0 or self.operations() < least or set(virsh) - set(self.by_virsh):
                steps -= 1
                self.power()
                self.write()
                self.snaptree()
                self.check(sound=True)
                if self.chance.random() < 0.5:
                    (self.virsh_and_repair if self.chance.random() < 0.5 else self.virsh_alone)()
        except BaseException as error:
            error.add_note("\n".join(self.journey))
            raise
