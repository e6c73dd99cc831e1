"""Steps that libvirt takes: loaded only for a domain."""

from __future__ import annotations

from snaptree.planning.domain_steps import Undefine, WriteRecords
from snaptree.running.context import Context
from snaptree.store import trees
from snaptree.store.libvirt import applying
from snaptree.store.libvirt.calls import Libvirt

_RECORD = "record "
"""Before the name of a record that is kept in the journal while libvirt has none of that name."""


def do(step: WriteRecords | Undefine, context: Context) -> None:
    """Take the step. A domain that libvirt does not know (any more) has no records."""
    libvirt = Libvirt(step.uri)
    try:
        domain = libvirt.find(step.uuid)
        if domain is None:
            return
        if isinstance(step, Undefine):
            domain.undefine(nvram=step.nvram)
            return
        tree = trees.load_tree(context.journal.database, context.journal.machine)
        names = (*tree.snapshots, *tree.branches)
        kept = {name: text for name in names if (text := context.journal.noted(_RECORD + name)) is not None}
        applying.apply(
            domain,
            tree,
            dict(step.renamed),
            keep=lambda name, text: context.journal.note(_RECORD + name, text),
            kept=kept,
        )
    finally:
        libvirt.close()
