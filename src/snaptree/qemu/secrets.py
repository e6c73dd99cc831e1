"""The keys of encrypted images that a running QEMU has: objects of its own, which images name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snaptree.images import gate
from snaptree.images.qemu_img import Keys, key_unknown
from snaptree.qemu.graph import BlockGraph, Node
from snaptree.qemu.running import RunningQemu
from snaptree.qemu.session import properties


async def with_key(
    qemu: RunningQemu, graph: BlockGraph, tip: Node, blockdev: Mapping[str, Any], keys: Keys
) -> dict[str, Any]:
    """How an overlay is opened, with the object that has its key: one of ours, or what a layer beneath was opened with.

    :param tip: what the overlay is to stand on.
    :param keys: the files with keys that are known, by locks; QEMU is given one when it has none.
    :raise RefusedError: QEMU does not tell which has the key, and nobody else does.
    """
    if "encrypt" not in blockdev:
        return dict(blockdev)
    path = blockdev["file"]["filename"]
    lock, ours = gate.lock_at(path), blockdev["encrypt"]["key-secret"]
    if ours in {name for name, _ in await properties(qemu.qmp, "/objects")}:
        return dict(blockdev)
    for each in graph.chain(tip):
        if each.secret and gate.lock_at(graph.file_of(each).path or "") == lock:
            return {**blockdev, "encrypt": {"format": "luks", "key-secret": each.secret}}
    if lock not in keys:
        raise key_unknown(path)
    await qemu.qmp.execute("object-add", qom_type="secret", id=ours, file=keys[lock])
    return dict(blockdev)
