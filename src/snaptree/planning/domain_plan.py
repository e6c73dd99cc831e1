"""What becomes of a plan where libvirt has the machine: what libvirt does itself, and what it is told."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from snaptree.model.domain import Domain
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.domain_steps import Undefine, WriteRecords, deferred, forgotten_by_libvirt, with_records
from snaptree.planning.plan import Plan
from snaptree.planning.steps import DeleteInternal
from snaptree.planning.verbs import GcRequest, RemoveRequest, RenameRequest, RepairRequest, Request


def for_domain(plan: Plan, request: Request, tree: Tree, survey: Survey, tell: WriteRecords, domain: Domain) -> Plan:
    """The plan for a request, as it is carried out on a domain.

    :param tell: the step that tells libvirt of a change of the tree that was just read.
    """
    if isinstance(request, RemoveRequest):
        # libvirt would remove the node of a device.
        variables = request.delete_files and not domain.nvram_left
        undefine = Undefine(tell.uri, tell.uuid, domain.name, nvram=variables, tpm=request.delete_files)
        return replace(plan, steps=(undefine, *plan.steps))
    if isinstance(request, RepairRequest):
        return replace(plan, steps=(_with_going(plan, tree, survey, tell)[1],))
    if isinstance(request, RenameRequest):
        tell = replace(tell, renamed=((request.old, request.new),))
    plan, tell = _with_going(plan, tree, survey, tell)
    plan = with_records(plan, tell)
    if isinstance(request, GcRequest):
        left = domain.hints.going if survey.live is None else frozenset()
        gone = _leftovers(tree, survey, left)
        touched = sorted({*plan.touches, *(each.path for each in gone)})
        tell = replace(tell, cleared=tuple(sorted(left)))
        plan = replace(plan, steps=(*plan.steps, *gone, tell), touches=tuple(touched))
    return plan


def told(plan: Plan, tree: Tree, survey: Survey, tell: WriteRecords) -> Plan:
    """The plan of what nobody has asked for by name, as it is carried out on a domain."""
    return with_records(*_with_going(plan, tree, survey, tell))


def _with_going(plan: Plan, tree: Tree, survey: Survey, tell: WriteRecords) -> tuple[Plan, WriteRecords]:
    """The plan in which libvirt does what QEMU would have to do with internal snapshots, and what it is told later.

    What it has no call for waits until the domain is off.
    """
    if survey.live is None:
        return plan, tell
    opened = {survey.layers[each].path for each in survey.live.open}
    plan, going = deferred(forgotten_by_libvirt(plan, tree, opened, tell), opened)
    return plan, replace(tell, going=going)


def _leftovers(tree: Tree, survey: Survey, going: Iterable[tuple[str, str]]) -> list[DeleteInternal]:
    """The steps that delete internal snapshots which nothing shows any more, of a domain that is off."""
    layers = {layer.path: layer for layer in tree.layers.values() if layer.owned}
    return [
        DeleteInternal(path, tag)
        for path, tag in sorted(going)
        if path in layers
        and tag not in tree.internals.get(layers[path].id, ())
        and any(each.name == tag for each in survey.layers[layers[path].id].internals)
    ]
