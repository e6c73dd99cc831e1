"""The keys of encrypted images that a running QEMU has: objects of its own, which it is told with an image."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from snaptree.errors import SnaptreeError
from snaptree.images import gate
from snaptree.images.qemu_img import Keys, no_key, opening
from snaptree.qemu.graph import BlockGraph, Node
from snaptree.qemu.running import RunningQemu


async def add_overlay(qemu: RunningQemu, graph: BlockGraph, tip: Node, blockdev: dict[str, Any], keys: Keys) -> None:
    """Open an overlay; one that is encrypted with the object that has its key.

    That is one of ours, which QEMU is given if the key is known, or what a layer beneath was opened with.

    :param tip: what the overlay is to stand on.
    :param keys: the files with keys that are known, by LUKS ids.
    :raise NoKeyError: QEMU does not tell which has the key and nobody else does, or it does not open it.
    """
    if "encrypt" not in blockdev:
        await qemu.add(blockdev)
        return
    path, ours = blockdev["file"]["filename"], blockdev["encrypt"]["key-secret"]
    luks = gate.luks_id_at(path)
    given = ours not in graph.keys and luks in keys
    try:
        with opening(path):
            if given:
                await qemu.qmp.execute("object-add", qom_type="secret", id=ours, file=keys[luks])
            elif ours not in graph.keys:
                blockdev = {**blockdev, "encrypt": {"format": "luks", "key-secret": _theirs(graph, tip, luks, path)}}
            await qemu.add(blockdev)
    except SnaptreeError:
        if given:
            with suppress(SnaptreeError):
                await qemu.qmp.execute("object-del", id=ours)
        raise


def _theirs(graph: BlockGraph, tip: Node, luks: str, path: str) -> str:
    """The object that a layer with the LUKS id was opened with, and that is there still."""
    for each in graph.chain(tip):
        if each.secret in graph.keys and gate.luks_id_at(graph.file_of(each).path or "") == luks:
            return each.secret
    raise no_key(path)
