"""Layers that are encrypted: whose LUKS header a new overlay gets, and what takes their keys.

To put an overlay on an encrypted layer takes no key, for it opens with those of the layer. QEMU's programs need them
for whatever reads or moves data. A QEMU that runs has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from snaptree.errors import RefusedError
from snaptree.model.layer import Layer, LayerId

if TYPE_CHECKING:
    from snaptree.planning.draft import Draft

LUKS_BYTES = 2 << 20
"""As much as an empty overlay occupies more with a LUKS header, at the most, as QEMU makes it."""


def seal(draft: Draft, layer: LayerId, purpose: str) -> str:
    """The path of the layer whose LUKS header a new overlay on this one gets; empty if nothing is encrypted there.

    What is copied on write may come from any layer beneath, and must not come to lie in the clear.

    :raise RefusedError: a layer is encrypted in a way that cannot be passed on.
    """
    for each in draft.tree.chain(layer):
        facts = draft.facts(each.id)
        if each.id in draft.sealed:
            return draft.sealed[each.id]
        if facts.encrypted and not facts.lock:
            raise RefusedError(f"cannot {purpose}: {_AES.format(each.path)}, and an overlay would not be", _CONVERT)
        if facts.encrypted and draft.survey.libvirt:
            raise RefusedError(f"cannot {purpose}: {_DOMAIN.format(each.path)}", _ALONE)
        if facts.encrypted:
            return each.path
    return ""


def require_keys(draft: Draft, layers: Iterable[Layer], purpose: str, *, running: bool = True) -> None:
    """Refuse what layers have to be opened for whose keys are not known.

    :param running: the machine's QEMU does it with those that it has open.
    :raise RefusedError: one of them is encrypted so.
    """
    for each in layers:
        if reason := locked(draft, each.id, running=running):
            raise RefusedError(f"cannot {purpose}: {reason}", hint(draft, each.id))


def locked(draft: Draft, layer: LayerId, *, running: bool = True) -> str:
    """Why a layer cannot be opened, by QEMU's programs or (``running``) by the machine's own; empty when it can."""
    facts, path = draft.facts(layer), draft.tree.layers[layer].path
    if facts.encrypted and draft.survey.libvirt:
        return _DOMAIN.format(path)
    if not facts.encrypted or facts.lock in draft.survey.keys or (running and draft.is_open(layer)):
        return ""
    return f"{path} is encrypted, and its key is not known" if facts.lock else _AES.format(path)


def hint(draft: Draft, layer: LayerId) -> str:
    """What to do about a layer that cannot be opened."""
    if draft.survey.libvirt:
        return _ALONE
    return f"give it: 'snaptree set {draft.tree.machine} --key FILE'" if draft.facts(layer).lock else _CONVERT


_DOMAIN = "{} is encrypted, and with libvirt's domains that is not handled"
_ALONE = "nothing of it was touched; machines that you start yourself may have encrypted disks"
_AES = "{} is encrypted in qcow2's old way (AES)"
_CONVERT = "only LUKS is handled: convert it with qemu-img"
