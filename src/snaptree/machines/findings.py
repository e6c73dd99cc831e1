"""What ``verify`` finds."""

from __future__ import annotations

from msgspec import Struct

SEVERITIES = ("error", "warning", "note")
"""The worst first."""


class Finding(Struct, frozen=True):
    """One thing that is not as the tree says.

    ``kind`` is a word (``missing``, ``changed``, ``damaged``, …), ``affects`` the snapshots and branches that
    need the file, ``severity`` ``error``, ``warning``, or ``note`` where there is nothing to see to.
    """

    kind: str
    path: str
    detail: str
    affects: tuple[str, ...] = ()
    hint: str = ""
    severity: str = "error"
