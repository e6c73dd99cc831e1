"""The one gate through which images are opened.

Backing names come from files that anybody may have written. They are resolved and checked here before QEMU sees them,
and QEMU is given whole graphs with explicit drivers, so that it neither probes a format nor follows a header.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from snaptree.errors import NotFoundError, RefusedError, UnhealthyError, UsageError
from snaptree.images.facts import guess_format, open_to_read, read_facts
from snaptree.images.header import CRYPT_LUKS, MAX_BACKING_NAME, is_qcow2, read_header
from snaptree.images.luks import LuksHeader, luks_id, read_luks
from snaptree.model.survey import LayerFacts
from snaptree.model.tree import MAX_CHAIN
from snaptree.paths import canonical, device_at

TEMPORARY_PREFIX = ".snaptree-"
KEY_PREFIX = "snaptree-key-"
_CRYPT_METHOD = 32
"""Where a header says how the image is encrypted."""
MAX_FILES = 20_000
"""So many files of a folder are looked at for overlays."""

# What QEMU takes for a protocol: a colon before the first slash (path_has_protocol in block.c).
_PROTOCOL = re.compile(r"^[^/]*?:")


def resolve_backing(overlay: str, name: str) -> str:
    """The canonical path of the backing file that the overlay names, as QEMU would find it.

    :raise RefusedError: the name is not a plain file name (``json:``, ``nbd:``, any protocol).
    """
    if not name or any(ord(character) < 32 for character in name):
        raise RefusedError(f"{overlay} names a backing file with control characters", "repair its header first")
    if _PROTOCOL.match(name):
        shown = name if len(name) <= 60 else name[:57] + "..."
        raise RefusedError(
            f"{overlay} names {shown!r} as its backing file, which is not a plain file name",
            "point it at a file with 'qemu-img rebase -u' if you trust it",
        )
    return canonical(os.path.join(os.path.dirname(overlay), name))


def relative_backing_name(overlay: str, backing: str) -> str:
    """The backing name to write into the overlay's header: relative to its folder, and never taken for a protocol.

    That of a block device is absolute: it stays right wherever the overlay goes.

    :raise RefusedError: it is longer than a header can hold.
    """
    name = os.path.relpath(backing, os.path.dirname(overlay)) if device_at(backing) is None else backing
    if _PROTOCOL.match(name):
        name = "./" + name
    if len(os.fsencode(name)) > MAX_BACKING_NAME:
        name = backing
    if len(os.fsencode(name)) > MAX_BACKING_NAME:
        raise RefusedError(
            f"the path {backing[:60]}... is too long for an image header", "move the files to a shorter path"
        )
    return name


class Link(Struct, frozen=True):
    """One image of a chain; its facts' ``backing`` is a canonical path."""

    path: str
    facts: LayerFacts


def read_chain(
    path: str,
    image_format: str | None,
    *,
    bases: Collection[str] = (),
    formats: Mapping[str, str] | None = None,
) -> tuple[Link, ...]:
    """Read an image and all beneath it, headers only, top first.

    :param bases: backing files outside the disk's folder that the user allows, or that the tree knows.
    :param formats: formats of backing files by path, where a header does not say it.
    :raise NotFoundError: the image is not there.
    :raise RefusedError: a backing file is somewhere that the user did not allow, or is not a plain file; an image is
        encrypted in another way than with LUKS.
    :raise UsageError: the image's format is not known and has to be said.
    :raise UnhealthyError: an image is damaged, missing, in a loop, or of another format than it should be.
    """
    at: str | None = canonical(path)
    assert at is not None
    folder = os.path.dirname(os.path.realpath(path))
    said = {os.path.realpath(each): value for each, value in (formats or {}).items()}
    allowed = {os.path.realpath(each) for each in bases}
    links: list[Link] = []
    seen: set[tuple[int, int]] = set()
    wanted = image_format
    while at is not None:
        above = links[-1].path if links else None
        facts = read_facts(at, wanted)
        _require_sound(facts, above, wanted)
        assert facts.identity is not None
        inode = (facts.identity.device, facts.identity.inode)
        if inode in seen:
            raise UnhealthyError(f"{at} is in a loop of backing files", "repair the headers with 'qemu-img rebase -u'")
        seen.add(inode)
        if len(links) >= MAX_CHAIN:
            raise RefusedError(f"the chain under {path} has more than {MAX_CHAIN} layers", "shorten it first")
        backing = resolve_backing(at, facts.backing) if facts.backing is not None else None
        links.append(Link(at, replace(facts, backing=backing)))
        if backing is not None:
            # Before anything is opened, even to find out what it is.
            _require_allowed(backing, at, folder, allowed)
            if above is None:
                _require_one_meaning(path, backing, facts.backing)
            wanted = _backing_format(at, backing, facts.backing_format or said.get(os.path.realpath(backing)))
        at = backing
    return tuple(links)


def _require_allowed(path: str, above: str, folder: str, allowed: Collection[str]) -> None:
    # By the file itself: a link in the folder may lead to any device.
    there = os.path.realpath(path)
    if os.path.dirname(there) != folder and there not in allowed:
        raise RefusedError(
            f"{above} stands on {path}, which is in another folder", f"if that is right, allow it with --base {path}"
        )


def _require_one_meaning(opened: str, backing: str, name: str | None) -> None:
    """QEMU looks for a relative name beside the path that it was given, even when that is a symbolic link.

    snaptree opens canonical paths only. Where the two are different files the guest has used the other one.
    """
    if name is None or os.path.isabs(name) or not os.path.islink(opened):
        return
    beside = os.path.join(os.path.dirname(os.path.abspath(opened)), name)
    if os.path.exists(beside) and not (os.path.exists(backing) and os.path.samefile(beside, backing)):
        raise RefusedError(
            f"{opened} is a symbolic link, and beside the link {name} is another file than beside the image",
            "give the path of the image itself, with an absolute backing name in its header",
        )


def _require_sound(facts: LayerFacts, above: str | None, wanted: str | None) -> None:
    path = facts.path
    if facts.problem == "missing":
        if above is None:
            raise NotFoundError(f"there is no image {path}", "check the path")
        raise UnhealthyError(f"{path}, the backing file of {above}, is not there", "put it back, or repair the header")
    if facts.problem == "unknown-format":
        raise UsageError(facts.detail, f"say it with --disk vda={path},format=raw (or format=qcow2)")
    if facts.problem == "external-data":
        raise RefusedError(facts.detail, "images with an external data file are not handled")
    if facts.problem == "not-qcow2" and above is not None:
        raise UnhealthyError(f"{path} is not the qcow2 image that {above} says it is", "repair the header's format")
    if facts.problem == "not-qcow2":
        raise UnhealthyError(facts.detail, f"if it is a raw disk, say so with --disk vda={path},format=raw")
    if facts.problem:
        raise UnhealthyError(facts.detail, "it cannot be looked after as it is; see 'qemu-img check'")
    if facts.encrypted and not facts.luks:
        raise RefusedError(f"{path} is encrypted in qcow2's old way (AES)", "convert it to LUKS with qemu-img")
    if facts.format not in ("qcow2", "raw"):
        raise RefusedError(f"{path} is {facts.format}, and only qcow2 and raw are handled", "convert it with qemu-img")
    if facts.dirty and above is not None:
        # The top may belong to a running machine, whose QEMU sets the bit while it has lazy refcounts.
        raise UnhealthyError(f"{path} was not closed cleanly", f"run 'qemu-img check -r all {path}' first")


def _backing_format(path: str, backing: str, said: str | None) -> str:
    """The format of a backing file: what the header says; without that, qcow2 when name and magic agree."""
    if said is not None:
        if said not in ("qcow2", "raw"):
            raise RefusedError(f"{path} says that {backing} is {said!r}", "only qcow2 and raw are handled")
        return said
    try:
        descriptor = open_to_read(backing)
    except OSError:
        return "raw"  # The next reading says what is wrong with it.
    try:
        guessed = guess_format(backing, os.pread(descriptor, 4, 0))
    finally:
        os.close(descriptor)
    if guessed is None:
        raise UnhealthyError(
            f"{path} does not say which format its backing file {backing} has",
            f"write it into the header: qemu-img rebase -u -F FORMAT -b {backing} {path}",
        )
    return guessed


def find_overlays(folders: Iterable[str], of: Collection[tuple[int, int]]) -> tuple[tuple[str, str], ...]:
    """The qcow2 images in the folders whose backing file is one of these inodes, as ``(overlay, backing file)``.

    Only headers are read; what cannot be read is passed over.
    """
    found: list[tuple[str, str]] = []
    inodes: dict[str, tuple[int, int] | None] = {}
    for folder in folders:
        for path in _regular_files(folder):
            backing = _backing_of(path)
            if backing is None:
                continue
            if backing not in inodes:
                inodes[backing] = _inode(backing)
            if inodes[backing] in of:
                found.append((path, backing))
    return tuple(found)


def _regular_files(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = [
                entry.path
                for entry in entries
                if not entry.name.startswith(TEMPORARY_PREFIX) and entry.is_file(follow_symlinks=False)
            ]
    except OSError:
        return []
    return sorted(names)[:MAX_FILES]


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode) else None


def _backing_of(path: str) -> str | None:
    try:
        descriptor = open_to_read(path)
    except OSError:
        return None
    try:
        if not is_qcow2(os.pread(descriptor, 4, 0)):
            return None
        header = read_header(descriptor, path)
        return resolve_backing(path, header.backing) if header.backing is not None else None
    except (OSError, RefusedError, UnhealthyError):
        return None
    finally:
        os.close(descriptor)


# ---- graphs for QEMU ----------------------------------------------------------------------------------------------


def blockdev(
    path: str,
    image_format: str,
    node: str | None,
    backing: dict[str, Any] | str | None,
    *,
    read_only: bool = True,
    locking: bool = True,
) -> dict[str, Any]:
    """One image as QEMU's ``BlockdevOptions``, with every driver named; ``backing`` overrides what the header says.

    Of a qcow2 image's clusters that become free the file's blocks are kept (see ``images/holes.py``). To one that is
    encrypted QEMU needs the key, as the object that :func:`key_object` names.

    :param locking: whether QEMU locks the file itself; not where it inherits our locks.
    """
    discard = "ignore" if image_format == "qcow2" else "unmap"
    driver = "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
    file: dict[str, Any] = {"driver": driver, "filename": path, "read-only": read_only, "discard": discard}
    if not locking:
        file["locking"] = "off"
    if read_only and node is not None:
        # The node can be made writable for a commit; the file is opened for writing only then. One without a name never
        # is, and its file must say so: qemu-img check (10.0.2) dies where it could write to the file but not the image.
        file = {**file, "read-only": False, "auto-read-only": True}
    found: dict[str, Any] = {"driver": image_format, "read-only": read_only, "discard": "unmap", "file": file}
    if node is not None:
        found["node-name"] = node
        file["node-name"] = f"{node}-file"
    if image_format == "qcow2":
        found["backing"] = backing
        # What cannot be read QEMU cannot open, and says so.
        with suppress(OSError, UnhealthyError):
            if luks := luks_id_at(path):
                found["encrypt"] = {"format": "luks", "key-secret": key_object(luks)}
    return found


def key_object(luks: str) -> str:
    """The name of the object of QEMU's that has the key of the images with this LUKS id."""
    return f"{KEY_PREFIX}{luks}"


def luks_id_at(path: str) -> str:
    """The id of a qcow2 image's LUKS header; empty without one.

    :raise UnhealthyError: the image is damaged.
    :raise OSError: it cannot be read.
    """
    descriptor = open_to_read(path)
    try:
        # All but a few have none, for which the first bytes are enough.
        if int.from_bytes(os.pread(descriptor, 4, _CRYPT_METHOD), "big") != CRYPT_LUKS:
            return ""
        return luks_id(descriptor, read_header(descriptor, path), path)
    finally:
        os.close(descriptor)


def luks_header_at(path: str) -> LuksHeader:
    """The LUKS header of a qcow2 image.

    :raise UnhealthyError: it has none, or is damaged.
    :raise OSError: it cannot be read.
    """
    descriptor = open_to_read(path)
    try:
        return read_luks(descriptor, read_header(descriptor, path), path)
    finally:
        os.close(descriptor)


def graph(chain: Sequence[tuple[str, str]], *, read_only: bool = True, locking: bool = True) -> dict[str, Any]:
    """A chain of ``(path, format)``, top first, as one nested graph; all but the top are read-only."""
    found: dict[str, Any] | None = None
    for number, (path, image_format) in reversed(list(enumerate(chain))):
        only_read = read_only if number == 0 else True
        found = blockdev(path, image_format, None, found, read_only=only_read, locking=locking)
    assert found is not None
    return found
