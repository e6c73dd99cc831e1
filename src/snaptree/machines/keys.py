"""Which key opens which encrypted layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from snaptree.errors import NotFoundError, RefusedError
from snaptree.images import gate, qemu_img
from snaptree.images.qemu_img import Graph


def with_keys(known: Mapping[str, str], files: Iterable[str], layers: Iterable[str]) -> Mapping[str, str]:
    """The known keys and these, by the locks that they open; QEMU tries each, which takes a second or two.

    :param files: their paths. What is in one is the passphrase, to the last byte: QEMU takes a line's end for a part.
    :param layers: the paths of the machine's qcow2 layers.
    :raise NotFoundError: there is no such file.
    :raise RefusedError: one opens none of the layers, or none of them is encrypted.
    """
    found = dict(known)
    locks = {lock: path for path in layers if (lock := gate.lock_at(path))}
    for file in files:
        if not os.path.isfile(file):
            raise NotFoundError(f"there is no key file {file}", "give the path of the file with the passphrase")
        if not os.access(file, os.R_OK):
            raise RefusedError(f"not allowed to read the key in {file}", "check its owner and mode, or use sudo")
        if not locks:
            raise RefusedError("none of the machine's layers is encrypted with LUKS", "leave out --key")
        opened = [lock for lock, path in locks.items() if qemu_img.opens(_alone(path), file)]
        if not opened:
            hint = "is there a line's end behind the passphrase? 'printf %s PASSPHRASE' writes none"
            raise RefusedError(f"the key in {file} opens none of the machine's encrypted layers", hint)
        found |= dict.fromkeys(opened, os.path.realpath(file))
    return found


def _alone(path: str) -> Graph:
    """A layer by itself, read only; a guest may have it open."""
    return gate.blockdev(path, "qcow2", None, None, locking=False)
