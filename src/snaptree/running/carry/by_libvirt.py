"""Steps that libvirt takes: loaded only for a domain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from snaptree.errors import BusyError
from snaptree.model.tree import Tree
from snaptree.planning.domain_steps import DomainMerge, DomainSnapshot, Undefine, WriteRecords
from snaptree.running.carry import domain_jobs
from snaptree.running.context import Context
from snaptree.store import trees
from snaptree.store.libvirt import applying
from snaptree.store.libvirt.calls import DomainHandle, Libvirt
from snaptree.store.libvirt.writing import Going

LibvirtStep: TypeAlias = DomainSnapshot | DomainMerge | WriteRecords | Undefine
_RECORD = "record "
"""Before the name of a record that is kept in the journal while libvirt has none of that name."""


@contextmanager
def _domain(step: LibvirtStep) -> Iterator[DomainHandle | None]:
    """The domain; ``None`` where libvirt does not know it (any more)."""
    libvirt = Libvirt(step.uri)
    try:
        yield libvirt.find(step.uuid)
    finally:
        libvirt.close()


async def do(step: LibvirtStep, context: Context) -> None:
    """Take the step. A domain that libvirt does not know (any more) has no records, and does not run."""
    with _domain(step) as domain:
        match step:
            case DomainSnapshot():
                domain_jobs.snapshot(step, domain)
            case DomainMerge():
                await domain_jobs.merge(step, domain, context)
            case WriteRecords() if domain is not None:
                _write(step, domain, context)
            case Undefine() if domain is not None:
                domain.undefine(nvram=step.nvram)
            case _:
                pass


def _write(step: WriteRecords, domain: DomainHandle, context: Context) -> None:
    tree = trees.load_tree(context.journal.database, context.journal.machine)
    _require_untouched(step, domain, tree)
    names = (*tree.snapshots, *tree.branches)
    kept = {name: text for name in names if (text := context.journal.noted(_RECORD + name)) is not None}
    applying.apply(
        domain,
        tree,
        dict(step.renamed),
        keep=lambda name, text: context.journal.note(_RECORD + name, text),
        kept=kept,
        known=step.known,
        going=Going(frozenset(step.going), frozenset(step.cleared)),
    )


def _require_untouched(step: WriteRecords, domain: DomainHandle, tree: Tree) -> None:
    """See that nobody else has given the domain other disks since it was planned.

    :raise BusyError: somebody has, while the operation was not at its end: what would go now may be needed.
    """
    chains = domain.chains()
    for disk, tip in tree.active_branch.tips.items():
        path = chains.get(disk, ("",))[0]
        mine = {tree.layers[tip.layer].path, *(each for target, each in step.tips if target == disk)}
        if step.tips and path and path not in mine:
            hint = (
                f"undo what was done to {domain.name} meanwhile, with virsh, then run 'snaptree recover {tree.machine}'"
            )
            raise BusyError(f"{disk} of domain {domain.name} is {path} by now, which somebody else has made so", hint)


def undo(step: LibvirtStep, context: Context) -> None:
    """Take the step back: what libvirt has begun is ended, and what it has written shows the same."""
    if isinstance(step, DomainMerge):
        with _domain(step) as domain:
            domain_jobs.unmerge(step, domain, context)


def happened(step: LibvirtStep, context: Context) -> bool:
    """Whether it has happened, or goes on, though we did not live to see it."""
    if not isinstance(step, DomainSnapshot | DomainMerge):
        return False
    with _domain(step) as domain:
        if isinstance(step, DomainSnapshot):
            return domain_jobs.was_cut(step, domain)
        return domain_jobs.went_on(step, domain)
