"""Counting the points at which something was killed, or befell a machine, for ``scripts/reliability``."""

from __future__ import annotations

import json
import os

WANTED = os.environ.get("SNAPTREE_POINTS_TOLD")
"""The file to which they are told, a line for each."""


def tried(job: str, befalls: str, count: int = 1) -> None:
    """Tell that it has been seen to that all is right after this has befallen a job of a running machine.

    :param count: at so many points.
    """
    if WANTED is None:
        return
    with open(WANTED, "a", encoding="utf-8") as file:
        file.write(json.dumps([job, befalls, count]) + "\n")
