"""Merging layers that a running machine has open: its QEMU does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from snaptree.model.delta import diff
from snaptree.model.layer import LayerId
from snaptree.model.live import PAUSED
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning import live_swap
from snaptree.planning.draft import Draft, is_tip, paths_of
from snaptree.planning.live_steps import LiveJob, LiveMerge
from snaptree.planning.merged import merged_down, merging
from snaptree.planning.plan import Plan
from snaptree.planning.steps import Record, Repoint, Step
from snaptree.planning.ways import Choice, Row, is_owned_root, obstacles, open_as_asked, require_room

USUAL_SPEED = 200e6
"""Bytes a second, for an estimate while a guest runs."""
PIVOT_SECONDS = 0.03
"""So long a guest's disk waits while it goes over to the layer that its tip was committed into."""


def is_live(survey: Survey, row: Row) -> bool:
    """Whether the machine's QEMU has what the merge would write to or take away.

    It has all that its tips stand on; what only lies beneath the row is read by everybody.
    """
    return survey.live is not None and row[-1] in survey.live.open


def merge_live(draft: Draft, rows: Sequence[Row], way: str) -> tuple[Plan, ...]:
    """The plans that merge these rows, one of each disk at the most.

    What is shared is shared first. Into the running tip that takes three: the guest goes on in an overlay meanwhile.

    :raise NoSpaceError: there is no room for the data.
    """
    choices: list[Choice] = []
    for row in rows:
        if row not in draft.survey.rows:
            draft.notes.append(f"{draft.tree.layers[row[0]].path} is not merged yet: a layer on it is new; gc does it")
            continue
        choice = _choose(draft, row, way)
        if isinstance(choice, str):
            draft.notes.append(choice)
        else:
            choices.append(choice)
    require_room(draft, choices)
    if not choices:
        nothing = Plan("merge", "merge nothing", (), 0, draft.tree, paths_after=paths_of(draft.tree))
        return (replace(nothing, notes=tuple(draft.notes)),)
    plans: list[Plan] = []
    shared = [choice for choice in choices if choice.way == "reflink"]
    frozen = [choice.row for choice in shared if live_swap.needs_overlay(draft, choice.row)]
    over: Mapping[Row, LayerId] = {}
    if frozen:
        plan, over = live_swap.freeze(draft, frozen)
        plans.append(plan)
        draft = _after(draft, plan)
    if shared:
        plan, over = live_swap.swap(draft, shared, over)
        plans.append(plan)
        draft = _after(draft, plan)
    moved = [choice for choice in choices if choice.way != "reflink"]
    moved += [live_swap.back(draft, layer) for layer in over.values()]
    draft.fresh |= frozenset(over.values())
    return (*plans, _steps(draft, moved)) if moved else tuple(plans)


def _after(draft: Draft, plan: Plan) -> Draft:
    found = Draft(plan.after, as_moved(draft.survey, plan.after), sick=draft.ailments)
    found.fresh = moved(found.survey)
    return found


def as_moved(survey: Survey, tree: Tree) -> Survey:
    """The survey of layers that are in other files by now, which nobody has read."""
    facts = {
        number: each
        if number not in tree.layers or tree.layers[number].path == each.path
        else replace(each, path=tree.layers[number].path, identity=None)
        for number, each in survey.layers.items()
    }
    return replace(survey, layers=facts)


def moved(survey: Survey) -> frozenset[LayerId]:
    """The layers of which :func:`as_moved` says so."""
    return frozenset(number for number, each in survey.layers.items() if each.identity is None and not each.problem)


def _choose(draft: Draft, row: Row, way: str) -> Choice | str:
    """The way to merge the row, or the sentence that says why it stays as it is.

    Into the running tip a pull is preferred, which always comes to its end; where the root would lose its name by it,
    a commit.
    """
    tree = draft.tree
    found = obstacles(draft, row)
    closed = {way: found[way] for way in ("commit", "pull") if way in found}
    # What keeps data from going down is nothing to a file that takes the highest layer's place, nor are sizes.
    if reason := live_swap.obstacle(draft, row, closed):
        closed["reflink"] = reason
    # Last, since nobody can open by asking for it what these close.
    if reason := _uneven(draft, row):
        closed |= {"commit": reason, "pull": reason}
    closed |= _forgotten(draft, row)
    if draft.survey.libvirt and not is_tip(tree, row[-1]):
        closed["pull"] = f"libvirt pulls nothing into {tree.layers[row[-1]].path}, which is not the tip"
    rooted = is_owned_root(tree, row[0])
    if rooted and "pull" not in closed and len(tree.children.get(row[0], ())) == 1:
        closed["pull"] = (
            f"{tree.layers[row[0]].path} is the root, and its name stays unless --merge pull says otherwise: "
            "nothing is renamed while the machine runs"
        )
    asked = ("commit", "pull", "reflink") if way == "auto" else (way,)
    if way != "auto":
        for each in asked:
            open_as_asked(draft, row, each, closed)
    live, waits = draft.survey.live, ""
    assert live is not None
    if draft.survey.libvirt and live.state == PAUSED:
        # Only with the guest running can QEMU be made to bring to disk what it has merged.
        waits = "its domain is paused: it is merged when the domain runs, or is off, by gc"
    elif job := live.backups.get(tree.layers[row[0]].disk):
        # While such a job is slowed down QEMU would do nothing else until it had copied what it has begun.
        waits = f"the backup job {job} of its QEMU copies it: it is merged when that has ended, by gc"
    elif is_tip(tree, row[-1]) and (job := live.jobs.get(tree.layers[row[0]].disk)):
        waits = (
            f"the job {job} of its QEMU works on {tree.layers[row[-1]].path}: it is merged when that has ended, by gc"
        )
    elif live.let_go:
        waits = (
            "its QEMU has let go of the disks with the memory that was saved: it is merged when the guest runs, by gc"
        )
    if waits:
        closed = dict.fromkeys(("commit", "pull", "reflink"), waits)
    facts = draft.survey.rows[row]
    choices = [Choice(row, each, facts, down=each == "commit") for each in asked if each not in closed]
    if not choices:
        reasons = dict.fromkeys(closed[each] for each in asked)
        return f"{tree.layers[row[0]].path} stays as it is: {'; '.join(reasons)}"
    into_tip = is_tip(tree, row[-1])

    def dearness(choice: Choice) -> tuple[bool, int, bool, bool]:
        shares = choice.way == "reflink"
        beside = shares and (into_tip or draft.survey.libvirt)
        worth = choice.bytes + (live_swap.NOT_WORTH if beside else 0)
        return into_tip and choice.down and "pull" not in closed, worth, shares, choice.down != rooted

    return min(choices, key=dearness)


def _uneven(draft: Draft, row: Row) -> str:
    """Why QEMU's jobs would show other data afterwards, if they would.

    They forget what a shorter layer in the middle hides (QEMU 10.0.2), and such a layer cannot be mended while it is
    open.
    """
    tree = draft.tree
    lowest = tree.layers[row[0]]
    near = [*row, *tree.children.get(row[-1], ()), *([lowest.parent] if lowest.parent is not None else [])]
    if len({tree.layers[each].virtual_size for each in near}) > 1:
        return f"the layers around {lowest.path} are of different sizes, which only a merge with the machine off minds"
    return ""


def _forgotten(draft: Draft, row: Row) -> dict[str, str]:
    """The ways that would lose what QEMU keeps of what was written to layers, with the reason.

    A dirty bitmap is its node's, and goes with it: a backup program would find it no more.
    """
    live = draft.survey.live
    assert live is not None
    found: dict[str, str] = {}
    for way, gone in (("commit", row[1:]), ("pull", row[:-1]), ("reflink", row)):
        for each in gone:
            if each in live.tracked:
                found[way] = f"its QEMU keeps dirty bitmaps of {draft.tree.layers[each].path}, which would be lost"
    return found


def _job(draft: Draft, choice: Choice) -> LiveJob:
    tree = draft.tree
    layers = [tree.layers[each] for each in choice.row]
    opened = draft.survey.live.open if draft.survey.live is not None else frozenset()
    above = [tree.layers[each] for each in tree.children.get(choice.row[-1], ()) if each in opened]
    facts = choice.facts
    return LiveJob(
        way=choice.way,
        disk=layers[0].disk,
        row=draft.files(choice.row),
        below=draft.files_below(choice.row[0]),
        child=(above[0].path, above[0].format) if above else None,
        bytes=choice.bytes,
        zeroes=facts.commit_zeroes if choice.down else 0,
        profile=facts.profile_commit if choice.down else facts.profile_pull,
    )


def _steps(draft: Draft, choices: Sequence[Choice]) -> Plan:
    tree = draft.tree
    jobs = tuple(_job(draft, choice) for choice in choices)
    written = [replace(tree.layers[choice.row[0]], half_merged=True) for choice in choices if choice.down]
    marked = draft.tree = tree.with_layers(*written)
    steps: list[Step] = []
    if written:
        steps.append(Record(diff(tree, marked), (), "note that the lower layers are being written"))
    steps.append(LiveMerge(jobs))
    no_return = len(steps)
    for choice in choices:
        if choice.down:
            steps += _repointed(draft, choice)
        draft.tree = merged_down(draft.tree, choice.row) if choice.down else live_swap.up(draft, choice.row)
    copied = sum(choice.bytes for choice in choices)
    seconds = 0.1 + copied / (draft.survey.bytes_per_second or USUAL_SPEED)
    pause = max((PIVOT_SECONDS for job in jobs if job.active), default=0.0)
    return merging(
        draft, choices, steps, no_return, before=tree, recorded=marked, seconds=seconds, live=True, pause=pause
    )


def _repointed(draft: Draft, choice: Choice) -> list[Step]:
    """Headers of other branches' layers that stand on what goes down; that of the line it runs on QEMU writes."""
    tree, live = draft.tree, draft.survey.live
    opened = live.open if live is not None else frozenset()
    lowest = tree.layers[choice.row[0]]
    beside = [tree.layers[each] for each in tree.children.get(choice.row[-1], ()) if each not in opened]
    return [Repoint(each.path, lowest.path, lowest.format) for each in beside if each.id not in draft.fresh]
