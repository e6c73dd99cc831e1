"""Memories: RAM and device state in a file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Memory:
    """RAM and device state in a file; it lives exactly as long as a snapshot or a branch refers to it.

    ``form`` says how it was written: ``background``, ``mapped-ram``, ``plain`` or ``libvirt``. ``size`` is in bytes.
    """

    id: int
    path: str
    form: str
    size: int
