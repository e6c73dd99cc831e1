"""The one name by which an image is known, and where it is opened.

A regular file is known by a path without links. A block device keeps the name that it was given: ``/dev/vg/lv`` leads
to another node after the next boot, when ``/dev/dm-3`` may be a stranger's. It is resolved to be opened and compared.
"""

from __future__ import annotations

import os
import stat

_DEVICES = "/dev/"


def canonical(path: str) -> str:
    """The path by which the image there is known: without links, but for that which leads to a block device."""
    if not _leads_to_device(path):
        return os.path.realpath(path)
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def opened_at(path: str) -> str:
    """Where an image is opened without following a link: for one that leads to a block device, the device's node."""
    return os.path.realpath(path) if _leads_to_device(path) else path


def device_at(path: str) -> int | None:
    """The number of the block device that the path leads to; ``None`` where it leads to none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None


def _leads_to_device(path: str) -> bool:
    """Whether the path is a link to a block device, or to one that is not there now.

    Only a link of root's or of our own counts: whoever may write to an image's folder could put one in its place.
    """
    try:
        status = os.lstat(path)
    except OSError:
        return False
    if not stat.S_ISLNK(status.st_mode) or status.st_uid not in (0, os.geteuid()):
        return False
    found = os.path.realpath(path)
    return device_at(found) is not None or (found.startswith(_DEVICES) and not os.path.lexists(found))
