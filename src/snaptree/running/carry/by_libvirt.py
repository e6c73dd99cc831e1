"""Steps that libvirt takes: loaded only for a domain."""

from __future__ import annotations

from typing import TypeAlias

from snaptree.errors import BusyError
from snaptree.model.tree import Tree
from snaptree.planning.domain_memory_steps import DomainGoOn, DomainGoOver, DomainMemoryStep, DomainSaveMemory
from snaptree.planning.domain_steps import (
    DomainForget,
    DomainMerge,
    DomainSnapshot,
    DomainSwap,
    LibvirtStep,
    Undefine,
    WriteRecords,
)
from snaptree.running.context import Context
from snaptree.store import trees
from snaptree.store.libvirt import applying
from snaptree.store.libvirt.calls import DomainHandle, connected
from snaptree.store.libvirt.writing import Going

DiskStep: TypeAlias = DomainSnapshot | DomainMerge | DomainSwap | DomainForget
_RECORD = "record "
"""Before the name of a record that is kept in the journal while libvirt has none of that name."""


def _domain(step: LibvirtStep) -> DomainHandle | None:
    """The domain; ``None`` where libvirt does not know it (any more)."""
    return connected(step.uri).find(step.uuid)


async def do(step: LibvirtStep, context: Context) -> None:
    """Take the step. A domain that libvirt does not know (any more) has no records, and does not run."""
    domain = _domain(step)
    match step:
        case DomainSaveMemory() | DomainGoOver() | DomainGoOn():
            await _with_memory(step, domain, context)
        case DomainSnapshot() | DomainMerge() | DomainSwap() | DomainForget():
            await _change(step, domain, context)
        case WriteRecords() if domain is not None:
            _write(step, domain, context)
        case Undefine() if domain is not None:
            domain.undefine(nvram=step.nvram, tpm=step.tpm)
        case _:
            pass


async def _change(step: DiskStep, domain: DomainHandle | None, context: Context) -> None:
    """What is done to the disks of a domain that runs; with one that is off it is not even loaded."""
    from snaptree.running.carry import domain_jobs, domain_swap

    match step:
        case DomainSnapshot():
            domain_jobs.snapshot(step, domain, context)
        case DomainMerge():
            await domain_jobs.merge(step, domain, context)
        case DomainSwap():
            await domain_swap.swap(step, domain, context)
        case DomainForget():
            domain_jobs.forget(step, domain, context)


async def _with_memory(step: DomainMemoryStep, domain: DomainHandle | None, context: Context) -> None:
    # What waits is loaded only where it is needed.
    from snaptree.running.carry import domain_memory

    match step:
        case DomainSaveMemory():
            await domain_memory.save(step, domain, context)
        case DomainGoOver():
            await domain_memory.go_over(step, domain, context)
        case DomainGoOn():
            domain_memory.go_on(step, domain, context)


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


async def undo(step: LibvirtStep, context: Context) -> None:
    """Take the step back: what libvirt has begun is ended, and what it has written shows the same."""
    if not isinstance(step, DomainSnapshot | DomainMerge | DomainSwap | DomainSaveMemory | DomainGoOver):
        return
    from snaptree.running.carry import domain_jobs, domain_memory, domain_swap

    domain = _domain(step)
    if isinstance(step, DomainMerge):
        domain_jobs.unmerge(step, domain, context)
    elif isinstance(step, DomainSwap):
        await domain_swap.unswap(step, domain, context)
    elif isinstance(step, DomainSnapshot):
        domain_jobs.unsnapshot(step, domain, context)
    elif isinstance(step, DomainGoOver):
        await domain_memory.ungo(step, domain, context)
    else:
        domain_memory.unsave(step, context)


async def happened(step: LibvirtStep, context: Context) -> bool:
    """Whether it has happened, or goes on, though we did not live to see it."""
    if not isinstance(step, DomainSnapshot | DomainMerge | DomainSwap | DomainSaveMemory | DomainGoOver):
        return False
    from snaptree.running.carry import domain_jobs, domain_memory, domain_swap

    domain = _domain(step)
    match step:
        case DomainSnapshot():
            return domain_jobs.was_taken(step, domain)
        case DomainMerge():
            return domain_jobs.went_on(step, domain, context)
        case DomainSwap():
            return await domain_swap.went_over(step, domain, context)
        case DomainSaveMemory():
            return domain_memory.was_saved(step, domain)
        case DomainGoOver():
            return domain_memory.has_gone(step, domain, context)
