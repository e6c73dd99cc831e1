"""Finding the disks of a machine that is to be looked after."""

from __future__ import annotations

import os

from snaptree.images import gate
from snaptree.machines.options import DiskOption
from snaptree.model.survey import LayerFacts
from snaptree.planning.adopt import FoundDisk


def find_disk(option: DiskOption, bases: tuple[str, ...], *, adopt: bool) -> FoundDisk:
    """Read a disk's chain through the gate; with ``adopt`` also the overlays that stand beside it.

    :raise SnaptreeError: the chain is not one that snaptree can look after.
    """
    links = gate.read_chain(option.path, option.format, bases=bases)
    chain = tuple(link.facts for link in links)
    if not adopt:
        return FoundDisk(option.target, chain)
    known = {facts.path for facts in chain}
    siblings: dict[str, tuple[LayerFacts, ...]] = {}
    waiting = list(chain)
    while waiting:
        inodes = {(each.identity.device, each.identity.inode) for each in waiting if each.identity is not None}
        folders = sorted({os.path.dirname(each.path) for each in chain})
        waiting = []
        for overlay, _ in gate.find_overlays(folders, inodes):
            if overlay in known or overlay in siblings:
                continue
            found = tuple(link.facts for link in gate.read_chain(overlay, "qcow2", bases=(*bases, *known)))
            siblings[overlay] = found
            waiting.append(found[0])
    return FoundDisk(option.target, chain, tuple(siblings.values()))
