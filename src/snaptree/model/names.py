"""Which names snapshots, branches, machines and disks may have."""

from __future__ import annotations

import re
import unicodedata

from snaptree.errors import UsageError

MAX_CHARACTERS = 100
MAX_BYTES = 180
"""A name becomes part of a file name (at most 255 bytes), beside the disk's own stem."""

_TARGET = re.compile(r"[a-z][a-z0-9_-]{0,31}")


def visible(text: str) -> str:
    """The text with everything spelled out that a terminal would act on or cannot show.

    Paths and names may come from images that anybody has written.
    """
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode("ascii") for each in text
    )


def check_name(name: str, what: str) -> str:
    """Return the name if a snapshot, branch or machine may have it.

    :param what: what is being named, for the message: ``snapshot``, ``branch`` or ``machine``.
    :raise UsageError: it is empty, too long, starts with a dot or a dash, or has slashes or control characters.
    """
    problem = ""
    if not name:
        problem = "is empty"
    elif len(name) > MAX_CHARACTERS or len(name.encode("utf-8", "surrogateescape")) > MAX_BYTES:
        problem = f"is longer than {MAX_CHARACTERS} characters or {MAX_BYTES} bytes"
    elif name[0] in ".-":
        problem = f"starts with {name[0]!r}"
    elif "/" in name:
        problem = "has a slash in it"
    elif any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp", "Cf") for character in name):
        problem = "has control characters or undecodable bytes in it"
    elif name != name.strip():
        problem = "starts or ends with a space"
    if problem:
        shown = name if len(name) <= 40 else name[:37] + "..."
        raise UsageError(
            f"the {what} name {shown!r} {problem}",
            "use letters, digits, spaces, dots, dashes and underscores, starting with a letter or a digit",
        )
    return name


def check_target(target: str) -> str:
    """Return the disk's target name (``vda``) if a disk may have it.

    :raise UsageError: it is not a lower-case word.
    """
    if not _TARGET.fullmatch(target):
        raise UsageError(f"{target[:40]!r} is not a disk target", "use a short word such as vda or sdb")
    return target
