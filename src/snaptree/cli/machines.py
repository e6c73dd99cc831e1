"""``add``, ``set``, ``disk``, ``remove``, ``list``, ``path``: machines and their disks."""

from __future__ import annotations

import os
import sys
from typing import Any

import click
from msgspec.structs import replace

from snaptree.cli.connecting import connect_option, connection
from snaptree.cli.output import carry_out, done, print_json, print_plan, say
from snaptree.cli.parsing import absolute, changing, disk_options, json_option, machine_argument
from snaptree.errors import NotFoundError, SnaptreeError, UsageError
from snaptree.machines.machine import Machine
from snaptree.machines.options import AddOptions
from snaptree.machines.standalone import existing
from snaptree.model.machine import LIBVIRT
from snaptree.planning.accept import OwnRequest
from snaptree.planning.adopt import DetachRequest
from snaptree.planning.launch import checked_command
from snaptree.planning.verbs import RemoveRequest, SetRequest

_base = click.option(
    "--base", "bases", multiple=True, metavar="PATH", help="Allow a backing file in another folder than the disk."
)
_nvram = click.option("--nvram", metavar="PATH", help="The file with the machine's UEFI variables.")
_tpm = click.option("--tpm", metavar="DIR", help="The folder with the machine's TPM state.")
_qmp = click.option(
    "--qmp", metavar="SOCKET", help="The QMP socket of a QEMU that you start yourself; with --start snaptree can, too."
)
_agent = click.option(
    "--agent", metavar="SOCKET", help="The socket of the guest's agent; without it QEMU is asked which it is."
)
_key = click.option(
    "--key",
    "keys",
    multiple=True,
    metavar="FILE",
    help="A file with the passphrase of encrypted (LUKS) layers, to the last byte; may be repeated.",
)
_start = click.option(
    "--start",
    metavar="COMMAND",
    help="QEMU's command line, without disks and monitor: 'snaptree start' fills them in. It is run in this folder. "
    "Where it has drive={vda} in a -device, there goes disk vda; without any such place each disk gets a device "
    "(virtio-blk-pci).",
)


@click.command("add")
@click.argument("machine")
@click.option(
    "--disk", "disks", multiple=True, metavar="[TARGET=]PATH[,format=F]", help="A disk of the machine; may be repeated."
)
@_base
@_nvram
@_tpm
@_qmp
@_agent
@_key
@_start
@click.option("--adopt", is_flag=True, help="Own the chain beneath the disks too, and overlays found beside it.")
@click.option("--from-xml", metavar="DIR", help="A folder of libvirt's snapshot XML to take the snapshots from.")
@changing
def add_command(
    machine: str,
    disks: tuple[str, ...],
    bases: tuple[str, ...],
    nvram: str | None,
    tpm: str | None,
    qmp: str | None,
    agent: str | None,
    keys: tuple[str, ...],
    start: str | None,
    adopt: bool,
    from_xml: str | None,
    only_plan: bool,
    as_json: bool,
    wait: float,
) -> None:
    """Look after a machine. A chain beneath a disk is foreign: it is read and never written to, unless --adopt."""
    if not disks:
        raise UsageError("a machine needs at least one disk", "name it with --disk vda=PATH")
    options = AddOptions(
        name=machine,
        disks=disk_options(disks),
        bases=tuple(absolute(base) or "" for base in bases),
        nvram=absolute(nvram),
        tpm=absolute(tpm),
        qmp=absolute(qmp),
        agent=absolute(agent),
        keys=tuple(absolute(key) or "" for key in keys),
        start=start,
        folder=os.getcwd() if start is not None else None,
        adopt=adopt or from_xml is not None,
        from_xml=absolute(from_xml),
    )
    _warn_of(options.keys)
    plan = connection().add(options, only_plan=only_plan, wait=wait)
    if only_plan:
        print_plan(plan, as_json=as_json)
    else:
        done(plan, as_json=as_json)


def _warn_of(keys: tuple[str, ...]) -> None:
    if not keys:
        return
    from snaptree.machines.keys import read_by_others

    for file in read_by_others(keys):
        say(f"note: others may read the key in {file} ('chmod 600' keeps them from it)", err=True)


@click.command("set")
@machine_argument
@_base
@_nvram
@_tpm
@_qmp
@_agent
@_key
@_start
@click.option("--adopt", is_flag=True, help="Of a domain of libvirt's: own what its disks stand on.")
@changing
def set_command(
    machine: str,
    bases: tuple[str, ...],
    nvram: str | None,
    tpm: str | None,
    qmp: str | None,
    agent: str | None,
    keys: tuple[str, ...],
    start: str | None,
    adopt: bool,
    only_plan: bool,
    as_json: bool,
    wait: float,
) -> None:
    """Change what is remembered of a machine. An empty value forgets it."""
    if adopt:
        if bases or keys or any(each is not None for each in (nvram, tpm, qmp, agent, start)):
            raise UsageError("--adopt is for libvirt's domains, and the other options are not", "give one of them")
        domain = connection().machine(machine)
        carry_out(domain, OwnRequest(), only_plan=only_plan, as_json=as_json, wait=wait)
        return
    found = connection().standalone(machine)
    changes: dict[str, Any] = {}
    if bases:
        changes["bases"] = tuple(dict.fromkeys((*found.config.bases, *(absolute(base) or "" for base in bases))))
    for key, value in (("nvram", nvram), ("tpm", tpm)):
        if value is not None:
            changes[key] = existing(absolute(value)) if value else None
    for key, socket in (("qmp", qmp), ("agent", agent)):
        if socket is not None:
            changes[key] = absolute(socket) if socket else None
    if keys:
        if "" in keys and len(keys) > 1:
            raise UsageError("an empty key forgets all of them", "forget them first, then give the others")
        files = tuple(absolute(key) or "" for key in keys if key)
        changes["keys"] = found.keys_with(files) if files else {}
        _warn_of(files)
    if start is not None:
        changes |= (
            {"start": checked_command(start), "folder": os.getcwd()} if start else {"start": None, "folder": None}
        )
    if not changes:
        raise UsageError("nothing to set", "give --base, --nvram, --tpm, --qmp, --agent, --key, --start or --adopt")
    request = SetRequest(replace(found.config, **changes))
    carry_out(found, request, only_plan=only_plan, as_json=as_json, wait=wait)


@click.group("disk")
def disk_command() -> None:
    """Attach and detach disks."""


@disk_command.command("attach")
@machine_argument
@click.argument("disk", metavar="TARGET=PATH[,format=F]")
@_base
@click.option("--adopt", is_flag=True, help="Own the chain beneath the disk too, and overlays found beside it.")
@changing
def attach_command(
    machine: str, disk: str, bases: tuple[str, ...], adopt: bool, only_plan: bool, as_json: bool, wait: float
) -> None:
    """Look after one more disk of a machine. While it runs, it must have the disk plugged in already."""
    if "=" not in disk:
        raise UsageError(f"{disk!r} is not TARGET=PATH", "use vdb=PATH")
    found = connection().standalone(machine)
    allowed = tuple(absolute(base) or "" for base in bases)
    request = found.attach_request(disk_options([disk])[0], allowed, adopt=adopt)
    carry_out(found, request, only_plan=only_plan, as_json=as_json, wait=wait)


@disk_command.command("detach")
@machine_argument
@click.argument("target")
@click.option("--delete-files", is_flag=True, help="Remove the files that nothing needs then.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@changing
def detach_command(
    machine: str, target: str, delete_files: bool, yes: bool, only_plan: bool, as_json: bool, wait: float
) -> None:
    """Let a disk go. Its files stay where they are unless --delete-files."""
    found = connection().machine(machine)
    request = DetachRequest(target, delete_files)
    if delete_files and not only_plan:
        _ask(f"Remove the files of disk {target} of {machine}?", yes=yes)
    carry_out(found, request, only_plan=only_plan, as_json=as_json, wait=wait)


@click.command("remove")
@machine_argument
@click.option("--delete-files", is_flag=True, help="Remove all files that the machine owns.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@changing
def remove_command(machine: str, delete_files: bool, yes: bool, only_plan: bool, as_json: bool, wait: float) -> None:
    """Forget a machine. Its files stay where they are unless --delete-files."""
    found = connection().machine(machine)
    if delete_files and not only_plan:
        _ask(f"Remove all files of machine {machine}?", yes=yes)
    carry_out(found, RemoveRequest(delete_files), only_plan=only_plan, as_json=as_json, wait=wait)


def _ask(question: str, *, yes: bool) -> None:
    """Ask before files are removed, on a terminal only."""
    if not yes and sys.stdin.isatty():
        click.confirm(question, abort=True)


@click.command("list")
@connect_option
@json_option
def list_command(as_json: bool) -> None:
    """List the machines that were added, and libvirt's domains."""
    door = connection()
    machines = [door.machine(name) for name in door.names()]
    try:
        machines += door.domains()
    except SnaptreeError as error:
        if door.uri is not None:
            raise
        # The environment names a connection that is of no use here: no reason to hide what was added.
        say(f"libvirt's domains are left out: {error.message}", err=True)
    rows: list[dict[str, Any]] = []
    for machine in machines:
        try:
            rows.append(_row(machine))
        except SnaptreeError as error:
            if machine.config.provider != LIBVIRT:
                raise
            # One domain that cannot be read does not hide the others.
            say(f"{machine.name} is left out: {error.message}", err=True)
    if as_json:
        print_json(rows)
        return
    if not rows:
        say("no machines yet; add one with 'snaptree add NAME --disk vda=PATH'")
        return
    width = max(len("MACHINE"), *(len(str(row["machine"])) for row in rows))
    say(f"{'MACHINE':{width}}  {'DISKS':12}  SNAPSHOTS  BRANCHES  ACTIVE")
    for row in rows:
        disks = ",".join(row["disks"])
        say(
            f"{row['machine']:{width}}  {disks:12}  {row['snapshots']:9d}  {row['branches']:8d}  {row['active_branch']}"
        )


def _row(machine: Machine) -> dict[str, Any]:
    tree = machine.tree()
    return {
        "machine": machine.name,
        "provider": machine.config.provider,
        "disks": list(tree.disks),
        "snapshots": len(tree.snapshots),
        "branches": len(tree.branches),
        "active_branch": tree.active,
        "pending": list(machine.unfinished()),
    }


@click.command("path")
@machine_argument
@click.argument("disk", required=False)
@json_option
def path_command(machine: str, disk: str | None, as_json: bool) -> None:
    """Print where the active tip of a disk is: the file to start the machine with."""
    found = connection().machine(machine)
    for line in found.unfinished():
        say(f"note: {line}; before that the path may be another", err=True)
    tree = found.tree()
    paths = {target: tree.layers[point.layer].path for target, point in sorted(tree.active_branch.tips.items())}
    if disk is not None and disk not in paths:
        raise NotFoundError(f"machine {machine} has no disk {disk!r}", f"its disks: {', '.join(paths)}")
    if as_json:
        print_json(paths if disk is None else {disk: paths[disk]})
    elif disk is not None:
        click.echo(paths[disk])
    elif len(paths) == 1:
        click.echo(next(iter(paths.values())))
    else:
        for target, path in paths.items():
            click.echo(f"{target} {path}")
