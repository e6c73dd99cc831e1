"""Memories: RAM and device state in a file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from msgspec import Struct, field

from snaptree.model.layer import Identity

FINISHING = "finish-migrate"
"""QEMU's word for a guest that it has stopped to save the last of it, and that may not go on yet."""
SLEEPING = "suspended"
"""QEMU's word for a guest that sleeps (ACPI S3)."""
BACKGROUND, MAPPED, PLAIN, LIBVIRT = "background", "mapped-ram", "plain", "libvirt"
"""How memory is written: while the guest runs on, or while it waits, in QEMU's newer form or in its older one; or by
libvirt, while it waits, as libvirt's save images are."""


class Memory(Struct, frozen=True):
    """RAM and device state in a file; it lives exactly as long as a snapshot or a branch refers to it.

    ``form`` says how it was written: ``background``, ``mapped-ram``, ``plain`` or ``libvirt``. ``size`` is in bytes.
    ``identity`` tells the file from another one and from itself changed; its ``header`` is the SHA-256 of the file's
    two ends. ``needs`` is what a machine must be like to load it, by a word for each aspect; ``state`` what the machine
    did at that instant, ``running`` (also when the guest slept: it goes on so) or ``paused``.
    """

    id: int
    path: str
    form: str
    size: int
    identity: Identity | None = None
    needs: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    state: str = "running"


class Saveable(Struct, frozen=True):
    """What a running machine's monitor says of its memory.

    :param ram: how much memory it has, in bytes.
    :param used: how much of that will be written at the most.
    :param needs: what a machine must be like to load it.
    :param forms: the forms in which it may be saved, the best first.
    :param obstacle: why it cannot be saved; empty where it can.
    :param asleep: the guest sleeps: it is not paused, and goes on as one that sleeps.
    """

    ram: int
    used: int
    needs: Mapping[str, str]
    forms: tuple[str, ...]
    obstacle: str = ""
    asleep: bool = False
