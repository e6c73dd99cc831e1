"""Checking the files of a machine against its tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec.structs import replace

from snaptree.errors import BusyError, NoKeyError, SnaptreeError
from snaptree.images import gate, qemu_img
from snaptree.images.qemu_img import NO_KEYS, Keys
from snaptree.machines.findings import SEVERITIES, Finding
from snaptree.model.invariants import violations
from snaptree.model.layer import Layer, LayerId
from snaptree.model.sizes import readable
from snaptree.model.survey import LayerFacts, Survey
from snaptree.model.tree import Tree
from snaptree.planning.draft import is_tip
from snaptree.planning.health import ailments
from snaptree.store import operations
from snaptree.store.database import Database

_HINTS = {
    "missing": "put the file back; what needs it cannot be used until then",
    "changed": "restore the file from a backup, delete what needs it, or take it as it is: "
    "snaptree verify {machine} --accept {path}",
    "damaged": "restore the file from a backup, or try 'qemu-img check -r all' on a copy",
    "corrupt": "try 'qemu-img check -r all' on a copy",
}

_LOOKS = 10
_STRANGER = "have it stand on a copy, or remove it; whoever merges into the layer by other means destroys it"
_CHECKED = 64 << 20
"""Bytes of reference counts; those of an image of 2 TiB as QEMU makes it."""


def verify(tree: Tree, survey: Survey, unfinished: Iterable[str] = (), keys: Keys = NO_KEYS) -> tuple[Finding, ...]:
    """Everything in which files and tree differ, worst first.

    :param unfinished: a sentence for each operation that is under way or was killed.
    :param keys: the files with the keys of encrypted layers.
    """
    found: list[Finding] = []
    sick = ailments(tree, survey)
    astray: dict[str, set[str]] = {}
    for number, why in survey.live.astray.items() if survey.live is not None else ():
        astray.setdefault(why, set()).update(affected(tree, number))
    for number, ailment in sick.items():
        layer = tree.layers[number]
        if ailment.word == "half-merged":
            found.append(_half_merged(tree, layer, ailment.detail))
            continue
        if ailment.detail in astray:
            continue
        hint = _HINTS.get(ailment.word, "repair the image first").format(machine=tree.machine, path=layer.path)
        found.append(Finding(ailment.word, layer.path, ailment.detail, affected(tree, number), hint))
    for detail, names in astray.items():
        hint = f"which of the files are not as the tree has them is seen when it is off: 'snaptree stop {tree.machine}'"
        found.append(Finding("changed", "", detail, tuple(sorted(names)), hint))
    for layer in tree.layers.values():
        facts = survey.layers[layer.id]
        blocked = layer.id in sick and sick[layer.id].blocks
        if facts.encrypted and facts.luks not in survey.keys:
            detail = f"{layer.path} is encrypted, and was not checked: its key is not known"
            hint = f"give it: 'snaptree set {tree.machine} --key FILE'" if facts.luks else ""
            found.append(Finding("encrypted", layer.path, detail, (), hint, "note"))
        elif survey.live is not None and layer.id in survey.live.open and is_tip(tree, layer.id):
            detail = f"the guest writes to {layer.path}, which was not checked"
            found.append(Finding("unchecked", layer.path, detail, (), "verify again when the machine is off", "note"))
        elif layer.id in survey.busy:
            detail = f"{layer.path} is being written to, or was when that was killed, and was not checked"
            found.append(Finding("unchecked", layer.path, detail, (), "verify again when that has ended", "note"))
        elif layer.format == "qcow2" and facts.exists and not blocked and _needs_too_much(facts):
            detail = f"{layer.path} has so many holes for its size that checking it takes too much, and was not checked"
            found.append(Finding("unchecked", layer.path, detail, (), "run 'qemu-img check' on it yourself", "note"))
        elif layer.format == "qcow2" and facts.exists and not blocked:
            found += _check(tree, layer.id, keys, dirty=facts.dirty)
    for memory, detail in survey.memories.items():
        who = tuple(sorted(each.name for each in tree.named if each.memory == memory))
        hint = "put the file back as it was, or go on without it: 'snaptree delete {} {} --memory-only'"
        found.append(Finding("memory", tree.memories[memory].path, detail, who, hint.format(tree.machine, who[0])))
    told = [replace(layer, half_merged=False) for layer in tree.layers.values() if layer.half_merged]
    for sentence in violations(tree.with_layers(*told), frozenset(each.layer for each in survey.outsiders)):
        found.append(Finding("tree", "", sentence, (), "run 'snaptree recover', then tell the authors"))
    for outsider in survey.outsiders:
        path = tree.layers[outsider.layer].path
        detail = f"{outsider.what} stands on {path}, which is left as it is therefore"
        found.append(Finding("outsider", path, detail, affected(tree, outsider.layer), _STRANGER, "warning"))
    for stray in survey.strays:
        detail = f"nothing needs {stray.path} ({readable(stray.allocated)})"
        found.append(
            Finding("over", stray.path, detail, (), f"'snaptree gc {tree.machine} --delete' removes it", "warning")
        )
    for sentence in unfinished:
        found.append(Finding("unfinished", "", sentence, (), f"run 'snaptree recover {tree.machine}'", "warning"))
    return tuple(sorted(found, key=lambda each: (SEVERITIES.index(each.severity), each.path)))


def _half_merged(tree: Tree, layer: Layer, detail: str) -> Finding:
    """What is to be said of a layer into which a commit has begun.

    Snaptree takes the names away before it merges; whoever does not leaves some that show a mixture.
    """
    names = sorted(tree.snapshots_on(layer.id))
    if not names:
        hint = f"'snaptree gc {tree.machine}' goes on"
        return Finding("half-merged", layer.path, detail, affected(tree, layer.id), hint, "warning")
    what = " and ".join(map(repr, names))
    detail = f"a commit into {layer.path} was interrupted while {what} was being deleted, and shows a mixture by now"
    hint = f"'snaptree delete {tree.machine} {' '.join(names)}' finishes it"
    return Finding("half-merged", layer.path, detail, tuple(names), hint)


def settled(database: Database, look: Callable[[], Iterable[Finding]]) -> tuple[Finding, ...]:
    """What is found, looked at anew where an operation has gone on meanwhile: no lock is taken for it.

    :raise BusyError: operations go on all the while.
    """
    for _ in range(_LOOKS):
        before = operations.moment(database)
        try:
            found = tuple(look())
        except OSError:
            if operations.moment(database) == before:
                raise
            continue
        if operations.moment(database) == before or all(each.severity != "error" for each in found):
            return found
    raise BusyError("files change all the while: other operations go on", "verify again when they have ended")


def _needs_too_much(facts: LayerFacts) -> bool:
    """Whether qemu-img would count more clusters than an honest image of so little data has.

    It takes memory and time for each cluster up to the file's end, holes too.
    """
    counts = facts.file_size // max(facts.cluster_size, 1) * facts.refcount_bits // 8
    return counts > _CHECKED and facts.allocated < facts.file_size // 8


def _check(tree: Tree, number: LayerId, keys: Keys, *, dirty: bool) -> list[Finding]:
    layer = tree.layers[number]
    who = affected(tree, number)
    try:
        result = qemu_img.check(gate.blockdev(layer.path, "qcow2", None, None), keys=keys)
    except NoKeyError as error:
        detail = f"{layer.path} is encrypted, and was not checked: {error.message}"
        hint = f"give another key: 'snaptree set {tree.machine} --key FILE'"
        return [Finding("encrypted", layer.path, detail, (), hint, "warning")]
    except BusyError:
        detail = f"{layer.path} is open in another process, and was not checked"
        hint = "verify again when nobody has it open"
        return [Finding("unchecked", layer.path, detail, (), hint, "note")]
    except SnaptreeError as error:
        return [Finding("damaged", layer.path, error.message, who, _HINTS["damaged"])]
    if dirty:
        hint = f"run 'qemu-img check -r all {layer.path}'"
        return [Finding("dirty", layer.path, f"{layer.path} was not closed cleanly", who, hint, "warning")]
    if result.errors:
        count = str(result.errors) if result.whole else f"more than {qemu_img.MOST_ERRORS}"
        detail = f"{layer.path} has {count} wrong reference counts or tables"
        return [Finding("damaged", layer.path, detail, who, _HINTS["damaged"])]
    if result.leaks:
        detail = f"{layer.path} has {result.leaks} leaked clusters; nothing is lost but room"
        return [Finding("leaks", layer.path, detail, (), f"'qemu-img check -r leaks {layer.path}'", "warning")]
    return []


def affected(tree: Tree, number: LayerId) -> tuple[str, ...]:
    """The snapshots and branches that cannot be shown without the layer."""
    found = {
        name
        for point, names in tree.names_on.items()
        if any(each.id == number for each in tree.chain(point.layer))
        for name in names
    }
    return tuple(sorted(found))
