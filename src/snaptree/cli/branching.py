"""``branch``, ``switch``, ``rename``."""

from __future__ import annotations

import click

from snaptree.cli.connecting import connection
from snaptree.cli.output import carry_out
from snaptree.cli.parsing import (
    branch_argument,
    changing,
    file_option,
    file_options,
    machine_argument,
    powered,
    remembered,
)
from snaptree.planning.create import BranchRequest
from snaptree.planning.revert import SwitchRequest
from snaptree.planning.verbs import RenameRequest


@click.command("branch")
@machine_argument
@click.argument("branch")
@click.option("--from", "source", metavar="SNAPSHOT", help="Grow it from a snapshot; without it, from here.")
@click.option("--switch", is_flag=True, help="Work on it at once.")
@file_option
@changing
def branch_command(
    machine: str,
    branch: str,
    source: str | None,
    switch: bool,
    files: tuple[str, ...],
    only_plan: bool,
    as_json: bool,
    wait: float,
) -> None:
    """Grow a branch with tips of its own."""
    found = connection().machine(machine)
    request = BranchRequest(branch, source, file_options(files))
    carry_out(found, request, only_plan=only_plan, as_json=as_json, wait=wait)
    if switch and not only_plan:
        carry_out(found, SwitchRequest(branch), only_plan=False, as_json=as_json, wait=wait)


@click.command("switch")
@machine_argument
@branch_argument()
@remembered
@powered
@file_option
@changing
def switch_command(
    machine: str,
    branch: str,
    files: tuple[str, ...],
    memory: bool | None,
    power: str | None,
    only_plan: bool,
    as_json: bool,
    wait: float,
) -> None:
    """Work on another branch; the one of now is parked as it is."""
    request = SwitchRequest(branch, file_options(files), power, memory)
    carry_out(connection().machine(machine), request, only_plan=only_plan, as_json=as_json, wait=wait)


@click.command("rename")
@machine_argument
@click.argument("old")
@click.argument("new")
@changing
def rename_command(machine: str, old: str, new: str, only_plan: bool, as_json: bool, wait: float) -> None:
    """Give a snapshot or a branch another name."""
    found = connection().machine(machine)
    carry_out(found, RenameRequest(old, new), only_plan=only_plan, as_json=as_json, wait=wait)
