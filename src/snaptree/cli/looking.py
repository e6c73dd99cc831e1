"""``tree``, ``show``, ``log``, ``branches``: looking without touching."""

from __future__ import annotations

import time

import click

from snaptree.cli.connecting import connection
from snaptree.cli.output import print_json, say
from snaptree.cli.parsing import json_option, machine_argument
from snaptree.errors import NotFoundError
from snaptree.machines import report
from snaptree.model.sizes import readable


@click.command("tree")
@machine_argument
@click.option("--svg", metavar="FILE", help="Write a picture instead.")
@json_option
def tree_command(machine: str, svg: str | None, as_json: bool) -> None:
    """Draw the tree with "you are here", and what deleting each name would free."""
    view = connection().machine(machine).view()
    if as_json:
        print_json(report.show(view))
    elif svg is not None:
        from snaptree.cli.picture import svg_of

        with open(svg, "w", encoding="utf-8") as file:
            file.write(svg_of(view))
        say(f"wrote {svg}")
    else:
        for line in report.draw(view):
            click.echo(line)


@click.command("show")
@machine_argument
@click.argument("snapshot", required=False)
@click.option("--xml", metavar="SNAPSHOT", help="Print a snapshot as libvirt's domainsnapshot XML.")
@json_option
def show_command(machine: str, snapshot: str | None, xml: str | None, as_json: bool) -> None:
    """Show a machine, or one of its snapshots or branches."""
    found = connection().machine(machine)
    if xml is not None:
        click.echo(found.snapshot_xml(xml), nl=False)
        return
    view = found.view()
    everything = report.show(view)
    if snapshot is not None:
        named = [each for each in (*everything["snapshots"], *everything["branches"]) if each["name"] == snapshot]
        if not named:
            raise NotFoundError(
                f"machine {machine} has no snapshot or branch {snapshot!r}", f"see 'snaptree tree {machine}'"
            )
        if as_json:
            print_json(named[0])
            return
        for key, value in named[0].items():
            if key in ("points", "tips"):
                for disk, point in value.items():
                    inside = f" (internal {point['internal']!r})" if point["internal"] else ""
                    say(f"{disk:>12}: {point['path']}{inside}")
            elif key == "created":
                say(f"{key:>12}: {report.moment(value)}")
            elif key == "frees":
                say(f"{key:>12}: {readable(value)}")
            elif value not in (None, ""):
                say(f"{key:>12}: {value}")
        return
    if as_json:
        print_json(everything)
        return
    say(f"machine {machine} ({everything['provider']}, {everything['state']}), on branch {view.tree.active!r}")
    if view.why:
        say(f"  {view.why}")
    for layer in everything["layers"]:
        room = f"{readable(layer['allocated']):>10} of {readable(layer['virtual_size']):>10}"
        health = f"  [{layer['health']}]" if layer["health"] != "ok" else ""
        say(f"  {layer['disk']:5} {layer['role']:8} {room}  {layer['path']}{health}")
    for memory in everything["memories"]:
        health = f"  [{memory['health']}]" if memory["health"] != "ok" else ""
        of = f"{readable(memory['size']):>10} of {', '.join(memory['names'])}"
        say(f"  {'memory':14} {of}  {memory['path']}{health}")
    for line in everything["pending"]:
        say(f"  pending: {line}")
    for line in everything["notes"]:
        say(f"  note: {line}")


@click.command("log")
@machine_argument
@json_option
def log_command(machine: str, as_json: bool) -> None:
    """List the machine's operations so far."""
    entries = connection().machine(machine).log()
    if as_json:
        keys = ("id", "operation", "summary", "state", "started", "ended", "bytes", "detail")
        print_json([{key: getattr(entry, key) for key in keys} for entry in entries])
        return
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.started))
        moved = f", moved {readable(entry.bytes)}" if entry.bytes else ""
        say(f"{entry.id:5d}  {when}  {entry.state:7}  {entry.summary}{moved}")
        if entry.detail:
            say(f"       {entry.detail}")


@click.command("branches")
@machine_argument
@json_option
def branches_command(machine: str, as_json: bool) -> None:
    """List the branches and their tips."""
    view = connection().machine(machine).view()
    branches = report.show(view)["branches"]
    if as_json:
        print_json(branches)
        return
    for branch in branches:
        say(f"{'*' if branch['active'] else ' '} {branch['name']}  (from {branch['parent'] or 'the beginning'})")
        for disk, point in branch["tips"].items():
            inside = f" (internal {point['internal']!r})" if point["internal"] else ""
            say(f"    {disk} {point['path']}{inside}")
        if branch["memory"]:
            say(f"    memory {branch['memory']}")
