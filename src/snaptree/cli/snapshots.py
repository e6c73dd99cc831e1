"""``snapshot``, ``delete``, ``revert``."""

from __future__ import annotations

import click

from snaptree.cli.connecting import connection
from snaptree.cli.output import carry_out
from snaptree.cli.parsing import (
    changing,
    file_option,
    file_options,
    machine_argument,
    merge_option,
    paced,
    powered,
    real_path,
    remembered,
    snapshot_argument,
)
from snaptree.errors import UsageError
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.revert import RevertRequest
from snaptree.planning.verbs import DeleteBranchRequest
from snaptree.running.pace import Pace


@click.command("snapshot")
@machine_argument
@click.argument("snapshot")
@click.option("--internal", is_flag=True, help="Keep the point within the image, where its format can.")
@click.option("--exclude", multiple=True, metavar="TARGET", help="Leave a disk out; may be repeated.")
@click.option("--quiesce", is_flag=True, help="Have the guest's agent freeze its file systems meanwhile.")
@file_option
@click.option("--memory", is_flag=True, help="Save the memory of the running machine as well, of the same instant.")
@click.option("--memory-file", metavar="PATH", help="Where the memory goes.")
@click.option("--description", default="", metavar="TEXT", help="What the snapshot is for.")
@changing
def snapshot_command(
    machine: str,
    snapshot: str,
    internal: bool,
    quiesce: bool,
    exclude: tuple[str, ...],
    files: tuple[str, ...],
    memory: bool,
    memory_file: str | None,
    description: str,
    only_plan: bool,
    as_json: bool,
    wait: float,
) -> None:
    """Take a snapshot of the machine as it is now."""
    place = real_path(memory_file) if memory_file is not None else None
    chosen = file_options(files)
    request = SnapshotRequest(snapshot, internal, exclude, chosen, description, memory, place, quiesce)
    carry_out(connection().machine(machine), request, only_plan=only_plan, as_json=as_json, wait=wait)


@click.command("delete")
@machine_argument
@snapshot_argument("snapshots", nargs=-1)
@merge_option
@click.option("--children", is_flag=True, help="Also delete the snapshots that grew from it.")
@click.option("--children-only", is_flag=True, help="Delete only the snapshots that grew from it.")
@click.option("--with-branches", is_flag=True, help="Also delete parked branches that grew from what is deleted.")
@click.option("--memory-only", is_flag=True, help="Delete only the memory; the disks' points stay.")
@click.option("--branch", metavar="BRANCH", help="Delete a parked branch instead.")
@paced
@changing
def delete_command(
    machine: str,
    snapshots: tuple[str, ...],
    merge: str,
    children: bool,
    children_only: bool,
    with_branches: bool,
    memory_only: bool,
    branch: str | None,
    only_plan: bool,
    as_json: bool,
    wait: float,
    limit: float,
    idle: bool,
) -> None:
    """Delete snapshots: the names go at once, then layers that nothing needs by themselves are merged."""
    found = connection().machine(machine)
    if branch is not None:
        if snapshots or children or children_only or with_branches or memory_only:
            raise UsageError("--branch deletes a branch and nothing else", "leave out the snapshots and their options")
        request: DeleteBranchRequest | DeleteRequest = DeleteBranchRequest(branch, merge)
    elif not snapshots:
        raise UsageError("no snapshot is named", f"see 'snaptree tree {machine}'")
    else:
        request = DeleteRequest(snapshots, merge, children, children_only, with_branches, memory_only)
    carry_out(found, request, only_plan=only_plan, as_json=as_json, wait=wait, pace=Pace(limit, idle))


@click.command("revert")
@machine_argument
@snapshot_argument()
@click.option("--discard", is_flag=True, help="Drop the work of now instead of parking it.")
@click.option("--keep-as", metavar="BRANCH", help="The name for the parked work of now.")
@click.option("--delete", is_flag=True, help="Delete the snapshot as well.")
@click.option("--children", is_flag=True, help="With --discard: delete the snapshots that grew from it.")
@remembered
@powered
@file_option
@paced
@changing
def revert_command(
    machine: str,
    snapshot: str,
    discard: bool,
    keep_as: str | None,
    delete: bool,
    children: bool,
    files: tuple[str, ...],
    memory: bool | None,
    power: str | None,
    only_plan: bool,
    as_json: bool,
    wait: float,
    limit: float,
    idle: bool,
) -> None:
    """Go back to a snapshot. The work of now is parked as a branch unless --discard."""
    request = RevertRequest(snapshot, discard, keep_as, delete, children, file_options(files), power, memory)
    carry_out(
        connection().machine(machine), request, only_plan=only_plan, as_json=as_json, wait=wait, pace=Pace(limit, idle)
    )
