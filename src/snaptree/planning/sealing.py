"""Layers that are encrypted: whose LUKS header a new overlay gets, and what takes their keys.

To put an overlay on an encrypted layer takes no key, for it opens with those of the layer. QEMU's programs need them
for whatever reads or moves data. A QEMU that runs has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from snaptree.errors import NoKeyError, RefusedError
from snaptree.model.layer import Layer, LayerId, Point
from snaptree.model.survey import LayerFacts

if TYPE_CHECKING:
    from snaptree.planning.draft import Draft

LUKS_BYTES = 2 << 20
"""As much as an empty overlay occupies more with a LUKS header, at the most, as QEMU makes it."""
OPENING_SECONDS = 2.0
"""So long QEMU takes by itself to try a passphrase (``iter-time``), once for each layer that it opens."""
_AES = "{} is encrypted in qcow2's old way (AES)"
_NO_KEY = "{} is encrypted, and its key is not known"
_DOMAIN = "{} is encrypted, and with libvirt's domains that is not handled"


def seal(draft: Draft, layer: LayerId, like: LayerFacts, purpose: str) -> LayerFacts | None:
    """The layer whose LUKS header a new one on this one gets; ``None`` if nothing is encrypted there.

    What is copied on write may come from any layer beneath, and must not come to lie in the clear.

    :param like: the layer that the new one has owner and mode of.
    :raise RefusedError: a layer is encrypted in a way that cannot be passed on, or more users could try passphrases.
    """
    for each in draft.tree.chain(layer):
        facts = draft.facts(each.id)
        if not facts.encrypted:
            continue
        if draft.survey.libvirt or not facts.luks:
            reason = (_DOMAIN if draft.survey.libvirt else _AES).format(each.path)
            raise RefusedError(f"cannot {purpose}: {reason}", key_hint(draft, each.id))
        # What is only being made has the rights of what it stands on.
        if each.id not in draft.sealed and like.opens(facts):
            reason = f"{like.path} may be read by users who may not read {each.path}, whose LUKS header it would have"
            raise RefusedError(f"cannot {purpose}: a file like {reason}", "make both alike with chmod and chgrp")
        return facts
    return None


def seal_point(draft: Draft, point: Point, size: int, purpose: str) -> LayerFacts | None:
    """As :func:`seal`, for a new layer that is made out of an internal snapshot: it takes the keys of the whole chain.

    :param size: how long the disk is there, in bytes.
    :raise RefusedError: also where the source is not encrypted and QEMU would have to copy the whole file.
    """
    source = draft.tree.layers[point.layer]
    require_keys(draft, draft.tree.chain(source.id), purpose)
    luks = seal(draft, source.id, draft.facts(source.id), purpose)
    if luks is not None and not draft.facts(source.id).encrypted and size != source.virtual_size:
        # It goes back to such a one in a copy, which would be as plain as the source.
        reason = f"{point.internal!r} in {source.path} is of another size than the disk, and would not be encrypted"
        raise RefusedError(f"cannot {purpose}: {reason} as {luks.path} is, beneath", "give the disk that size first")
    return luks


def require_keys(draft: Draft, layers: Iterable[Layer], purpose: str, *, running: bool = False) -> None:
    """Refuse what layers have to be opened for whose keys are not known.

    :param running: the machine's QEMU does it, with those that it has open.
    :raise NoKeyError: one of them is encrypted so.
    """
    for each in layers:
        if reason := unopened(draft, each.id, running=running):
            raise NoKeyError(f"cannot {purpose}: {reason}", key_hint(draft, each.id))


def unopened(draft: Draft, layer: LayerId, *, running: bool = False) -> str:
    """Why a layer cannot be opened by QEMU's programs, or (``running``) by the machine's own; empty when it can."""
    facts, path = draft.facts(layer), draft.tree.layers[layer].path
    if facts.encrypted and draft.survey.libvirt:
        return _DOMAIN.format(path)
    if not facts.encrypted or facts.luks in draft.survey.keys or (running and draft.is_open(layer)):
        return ""
    return (_NO_KEY if facts.luks else _AES).format(path)


def opening_seconds(draft: Draft, rows: Iterable[Sequence[LayerId]]) -> float:
    """How long QEMU takes to open what is encrypted of these rows and beneath them; each key is tried before, too."""
    layers = [layer for row in rows for layer in (*row[1:], *(each.id for each in draft.tree.chain(row[0])))]
    ids = [facts.luks for facts in map(draft.facts, layers) if facts.encrypted]
    return (len(ids) + len(set(ids))) * OPENING_SECONDS


def key_hint(draft: Draft, layer: LayerId) -> str:
    """What to do about a layer that cannot be opened."""
    if draft.survey.libvirt:
        return "machines that you start yourself may have encrypted disks"
    if not draft.facts(layer).luks:
        return "only LUKS is handled: convert it with qemu-img"
    return f"give it: 'snaptree set {draft.tree.machine} --key FILE'"
