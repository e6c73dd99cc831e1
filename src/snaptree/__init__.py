"""Snapshots of QEMU machines as a tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from snaptree.machines.asynchronous import Machines

__version__ = "0.1.0"


def connect(state: str | None = None, uri: str | None = None) -> Machines:
    """The machines of a state folder, for ``async with``; without one ``$SNAPTREE_STATE`` or the default.

    :param uri: the connection to libvirt, whose domains are machines too; without it ``LIBVIRT_DEFAULT_URI``.
    """
    from snaptree.machines.asynchronous import Machines

    return Machines(state, uri)
