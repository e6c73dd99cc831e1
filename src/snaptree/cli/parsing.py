"""Reading what the user typed: machines, disks, files, sizes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from snaptree.cli.connecting import connect_option, connection
from snaptree.errors import UsageError
from snaptree.machines.options import DiskOption
from snaptree.model.names import check_target

F = TypeVar("F", bound=Callable[..., Any])
_TARGET = re.compile(r"^([A-Za-z][A-Za-z0-9_-]*)=(.*)$", re.DOTALL)
_RATE = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*([kmgt])?(iB|B|i)?(?:/s)?$", re.IGNORECASE)
_FORMAT = re.compile(r"^(.*),format=([a-z0-9]+)$", re.DOTALL)


def disk_options(texts: Sequence[str]) -> tuple[DiskOption, ...]:
    """``[TARGET=]PATH[,format=F]`` for each disk; those without a target are ``vda``, ``vdb`` and so on."""
    found: list[DiskOption] = []
    named = {match.group(1) for text in texts if (match := _TARGET.match(text))}
    free = (f"vd{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" if f"vd{letter}" not in named)
    for text in texts:
        form = None
        if match := _FORMAT.match(text):
            text, form = match.group(1), match.group(2)
            if form not in ("qcow2", "raw"):
                raise UsageError(f"format {form!r} is not handled", "use format=qcow2 or format=raw")
        if match := _TARGET.match(text):
            target, path = check_target(match.group(1)), match.group(2)
        else:
            target, path = next(free), text
        if not path:
            raise UsageError(f"disk {target} has no path", "use --disk vda=PATH")
        found.append(DiskOption(target, os.path.abspath(path), form))
    return tuple(found)


def file_options(texts: Sequence[str]) -> dict[str, str]:
    """``TARGET=PATH`` for each disk whose new file the user names."""
    found: dict[str, str] = {}
    for text in texts:
        match = _TARGET.match(text)
        if match is None:
            raise UsageError(f"{text!r} is not TARGET=PATH", "use --file vda=PATH")
        target = check_target(match.group(1))
        if target in found:
            raise UsageError(f"--file is given twice for {target}", "give one path for each disk")
        found[target] = real_path(match.group(2))
    return found


def real_path(text: str) -> str:
    """The path from the root of a file that is to be made, in a folder without links."""
    return os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))


def absolute(path: str | None) -> str | None:
    """The path from the root, if there is one."""
    return os.path.abspath(path) if path is not None else None


def _complete_machine(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        door = connection()
        names = (*door.names(), *(each.name for each in door.domains()))
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]
    except Exception:
        return []


def _complete_name(kind: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            tree = connection().machine(context.params["machine"]).tree()
        except Exception:
            return []
        names = [*(tree.snapshots if kind != "branch" else ()), *(tree.branches if kind != "snapshot" else ())]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]

    return complete


def machine_argument(function: F) -> F:
    """The machine, completed from those that there are, and the connection to libvirt that may have it."""
    return click.argument("machine", shell_complete=_complete_machine)(connect_option(function))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
file_option = click.option(
    "--file", "files", multiple=True, metavar="TARGET=PATH", help="Where the new layer of a disk goes."
)
merge_option = click.option(
    "--merge",
    type=click.Choice(["auto", "none", "commit", "pull", "reflink"]),
    default="auto",
    show_default=True,
    help="How to merge what becomes loose: down, up, by sharing blocks, the cheapest way, or not now.",
)


def snapshot_argument(name: str = "snapshot", **options: Any) -> Callable[[F], F]:
    """The name of a snapshot, completed from those that there are."""
    return click.argument(name, shell_complete=_complete_name("snapshot"), **options)


def branch_argument(name: str = "branch", **options: Any) -> Callable[[F], F]:
    """The name of a branch, completed from those that there are."""
    return click.argument(name, shell_complete=_complete_name("branch"), **options)


def bytes_a_second(text: str) -> float:
    """``200MiB/s`` as a number.

    :raise UsageError: it is not a rate.
    """
    match = _RATE.match(text.strip())
    if match is None or not float(match.group(1)):
        raise UsageError(f"{text!r} is not a rate", "give bytes a second, such as 200MiB/s")
    power = " kmgt".index((match.group(2) or " ").lower())
    return float(match.group(1)) * float((1000 if match.group(3) == "B" and match.group(2) else 1024) ** power)


def _rate(context: click.Context, parameter: click.Parameter, text: str | None) -> float:
    return bytes_a_second(text) if text is not None else 0.0


def paced(function: F) -> F:
    """The options of commands that move data."""
    for option in (
        click.option(
            "--idle",
            is_flag=True,
            help="Let everybody else's disk accesses go first; a QEMU that runs, or libvirt, knows only --limit.",
        ),
        click.option("--limit", metavar="RATE", callback=_rate, help="Move no more than so much, such as 200MiB/s."),
    ):
        function = option(function)
    return function


def powered(function: F) -> F:
    """The options of commands that go to other disks: what the machine does afterwards."""
    for word, state in (("stopped", "off"), ("paused", "paused"), ("running", "running")):
        option = click.option(f"--{word}", "power", flag_value=state, help=f"Afterwards the machine is {state}.")
        function = option(function)
    return function


def remembered(function: F) -> F:
    """The option of commands that go to other disks: whether memory is loaded, and that of now parked."""
    return click.option(
        "--memory/--no-memory",
        "memory",
        default=None,
        help="Park the memory of now, and load what is there; by default where the target has memory.",
    )(function)


def changing(function: F) -> F:
    """The options that every command has which changes something."""
    for option in (
        json_option,
        click.option("--plan", "only_plan", is_flag=True, help="Print what would be done and do nothing."),
        click.option(
            "--wait",
            type=click.FloatRange(0),
            default=0.0,
            metavar="SECONDS",
            help="Wait for another operation to end.",
        ),
    ):
        function = option(function)
    return function
