"""What ``verify`` finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
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
