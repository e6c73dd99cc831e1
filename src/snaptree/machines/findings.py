"""What ``verify`` finds."""

from __future__ import annotations

from msgspec import Struct


class Finding(Struct, frozen=True):
    """One thing that is not as the tree says.

    ``kind`` is a word (``missing``, ``changed``, ``damaged``, …), ``affects`` the snapshots and branches that
    need the file, ``severity`` ``error`` or ``warning``.
    """

    kind: str
    path: str
    detail: str
    affects: tuple[str, ...] = ()
    hint: str = ""
    severity: str = "error"
