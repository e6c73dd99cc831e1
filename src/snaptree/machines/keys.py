"""Which key opens which encrypted layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from snaptree.errors import NoKeyError, NotFoundError, RefusedError
from snaptree.images.facts import read_facts
from snaptree.images.qemu_img import require_opened


def with_keys(known: Mapping[str, str], files: Iterable[str], layers: Iterable[str]) -> Mapping[str, str]:
    """The known keys and these, by the LUKS ids of the layers that they open; QEMU tries each on each.

    :param files: their paths. What is in one is the passphrase, to the last byte: QEMU takes a line's end for a part.
    :param layers: the paths of the machine's qcow2 layers.
    :raise NotFoundError: there is no such file.
    :raise RefusedError: one opens none of the layers, or none of them is encrypted.
    """
    found = dict(known)
    facts = [read_facts(path, "qcow2") for path in layers]
    # What is not sound is not for QEMU to open.
    encrypted = {each.luks: each.path for each in facts if each.luks and not each.problem}
    for file in files:
        if not os.path.isfile(file):
            raise NotFoundError(f"there is no key file {file}", "give the path of the file with the passphrase")
        if not os.access(file, os.R_OK):
            raise RefusedError(f"not allowed to read the key in {file}", "check its owner and mode, or use sudo")
        if not encrypted:
            raise RefusedError("none of the machine's layers is encrypted with LUKS", "leave out --key")
        opened = [luks for luks, path in encrypted.items() if _opens(path, luks, file)]
        if not opened:
            hint = "is there a line's end behind the passphrase? 'printf %s PASSPHRASE' writes none"
            raise RefusedError(f"the key in {file} opens none of the machine's encrypted layers", hint)
        found |= dict.fromkeys(opened, os.path.realpath(file))
    return found


def _opens(path: str, luks: str, file: str) -> bool:
    try:
        require_opened(path, {luks: file})
    except NoKeyError:
        return False
    return True


def read_by_others(files: Iterable[str]) -> tuple[str, ...]:
    """Those of the key files that others than their owner may read."""
    return tuple(file for file in files if os.path.isfile(file) and os.stat(file).st_mode & 0o077)
