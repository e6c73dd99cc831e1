"""``start``, ``stop``: machines that run."""

from __future__ import annotations

import click

from snaptree.cli.connecting import connection
from snaptree.cli.output import print_json, print_plan, say
from snaptree.cli.parsing import changing, machine_argument
from snaptree.machines import switching
from snaptree.planning.plan import Plan


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    """Print a plan of one thing that is neither undone nor finished: it has no steps."""
    if as_json:
        print_plan(plan, as_json=True)
        return
    say(f"{plan.summary}:")
    for note in plan.notes:
        say(f"  {note}")


@click.command("start")
@machine_argument
@changing
def start_command(machine: str, only_plan: bool, as_json: bool, wait: float) -> None:
    """Start a machine from its stored command (add --start), on its active tips."""
    found = connection().standalone(machine)
    if only_plan:
        _print_plan(switching.start_plan(found), as_json=as_json)
        return
    state = switching.start(found, wait=wait)
    if as_json:
        print_json({"machine": machine, "state": state})
    else:
        say(f"machine {machine} is {state}")


@click.command("stop")
@machine_argument
@click.option("--force", is_flag=True, help="Turn it off at once, as by pulling the plug.")
@click.option(
    "--within",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="So long the guest may take to shut down; then it is turned off by force.",
)
@changing
def stop_command(machine: str, force: bool, within: float, only_plan: bool, as_json: bool, wait: float) -> None:
    """Ask a machine to shut down, and turn it off when it has not done so in time."""
    found = connection().standalone(machine)
    if only_plan:
        _print_plan(switching.stop_plan(found, force=force), as_json=as_json)
        return
    how = switching.stop(found, seconds=within, force=force, wait=wait)
    if as_json:
        print_json({"machine": machine, "state": "off", "how": how})
    else:
        say(f"machine {machine} is off: {how}")
