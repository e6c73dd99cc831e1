"""Firmware state: copied aside with each snapshot and each branch that is parked, and put back."""

from __future__ import annotations

import posixpath

from snaptree.model.snapshot import FirmwareFile
from snaptree.planning.draft import Draft
from snaptree.planning.live_steps import Kept
from snaptree.planning.steps import CopyFirmware


def keep(draft: Draft) -> tuple[FirmwareFile, ...]:
    """Copy the live firmware state aside."""
    copies = []
    for role, live in sorted(draft.survey.firmware.items()):
        target = posixpath.join(draft.survey.keep, f"{draft.survey.token}-{len(draft.prepare)}-{role}")
        draft.prepare.append(CopyFirmware(role=role, source=live, target=target))
        copies.append(FirmwareFile(role, target))
    return tuple(copies)


def kept(draft: Draft) -> tuple[Kept, ...]:
    """The copies that are made before the tree changes, for a step that brings them up to date."""
    made = [each for each in draft.prepare if isinstance(each, CopyFirmware)]
    return tuple(Kept(each.role, each.source, each.target) for each in made)


def returning(draft: Draft, pieces: tuple[FirmwareFile, ...]) -> tuple[Kept, ...]:
    """Where copies belong; one of something that the machine has not now is left alone."""
    found = []
    for piece in pieces:
        live = draft.survey.firmware.get(piece.role)
        if live is None:
            draft.notes.append(f"the machine has no {piece.role} state now; the copy in {piece.path} was left alone")
        else:
            found.append(Kept(piece.role, live, piece.path))
    return tuple(found)


def put_back(draft: Draft, pieces: tuple[FirmwareFile, ...]) -> None:
    """Put copies back over the live state, when the tree has changed."""
    for each in returning(draft, pieces):
        draft.finish.append(CopyFirmware(role=each.role, source=each.copy, target=each.live, replace=True))
