"""``squash``, ``verify``, ``recover``, ``gc``."""

from __future__ import annotations

import click

from snaptree.cli.connecting import connection
from snaptree.cli.output import carry_out, print_json, say
from snaptree.cli.parsing import changing, json_option, machine_argument, merge_option, paced
from snaptree.errors import AttentionError, FindingsError, UsageError
from snaptree.paths import canonical
from snaptree.planning.accept import AcceptRequest
from snaptree.planning.sweep import SquashRequest
from snaptree.planning.verbs import GcRequest, RepairRequest
from snaptree.running.pace import Pace


@click.command("squash")
@machine_argument
@click.option("--disk", default="vda", show_default=True, metavar="TARGET", help="The disk whose layers are merged.")
@click.option("--top", metavar="PATH", help="The highest layer to merge; without it, the active tip.")
@click.option("--base", metavar="PATH", help="The lowest layer to merge; without it, as deep as can be.")
@merge_option
@paced
@changing
def squash_command(
    machine: str,
    disk: str,
    top: str | None,
    base: str | None,
    merge: str,
    only_plan: bool,
    as_json: bool,
    wait: float,
    limit: float,
    idle: bool,
) -> None:
    """Make one layer of all from --base up to --top, both included; never across a point that a name needs."""
    highest = canonical(top) if top is not None else None
    lowest = canonical(base) if base is not None else None
    request = SquashRequest(disk, highest, lowest, merge)
    carry_out(
        connection().machine(machine), request, only_plan=only_plan, as_json=as_json, wait=wait, pace=Pace(limit, idle)
    )


@click.command("verify")
@machine_argument
@click.option("--accept", metavar="PATH", help="Take a frozen layer that was changed from outside for what it is now.")
@click.option("--repair", is_flag=True, help="Of a libvirt domain: put libvirt's records right, by the files.")
@changing
def verify_command(machine: str, accept: str | None, repair: bool, only_plan: bool, as_json: bool, wait: float) -> None:
    """Check the machine's files against its tree, and libvirt's records of a domain against both."""
    if repair:
        if accept is not None:
            raise UsageError("--repair and --accept exclude each other", "give one of them")
        found = connection().machine(machine)
        carry_out(found, RepairRequest(), only_plan=only_plan, as_json=as_json, wait=wait)
        return
    if accept is not None:
        request = AcceptRequest(canonical(accept))
        carry_out(connection().machine(machine), request, only_plan=only_plan, as_json=as_json, wait=wait)
        return
    if only_plan:
        raise UsageError("--plan goes with --accept and --repair: without them verify changes nothing", "leave it out")
    findings = connection().machine(machine).verify()
    if as_json:
        keys = ("kind", "path", "detail", "affects", "hint", "severity")
        print_json({"machine": machine, "findings": [{key: getattr(each, key) for key in keys} for each in findings]})
    else:
        for each in findings:
            say(f"{each.severity}: {each.detail} ({each.kind})")
            if each.affects:
                say(f"  needed by: {', '.join(each.affects)}")
            if each.hint:
                say(f"  hint: {each.hint}")
        if not findings:
            say(f"{machine}: all files are as the tree says")
    wrong, seen = (sum(each.severity == severity for each in findings) for severity in ("error", "warning"))
    if wrong:
        raise FindingsError(f"{machine}: {wrong} thing{'s are' if wrong > 1 else ' is'} not as the tree says")
    if seen:
        raise AttentionError(
            f"{machine}: all that is kept is whole; {seen} thing{'s want' if seen > 1 else ' wants'} seeing to"
        )


@click.command("recover")
@click.argument("machine", required=False)
@click.option("--wait", type=click.FloatRange(0), default=0.0, metavar="SECONDS", help="Wait for another operation.")
@json_option
def recover_command(machine: str | None, wait: float, as_json: bool) -> None:
    """Finish or undo what was killed, on one machine or on all."""
    sentences = connection().recover(machine, wait=wait)
    if as_json:
        print_json({"recovered": list(sentences)})
        return
    for sentence in sentences:
        say(sentence)
    if not sentences:
        say("nothing to recover")


@click.command("gc")
@machine_argument
@click.option("--delete", is_flag=True, help="Also remove files that snaptree made and nothing needs.")
@paced
@changing
def gc_command(
    machine: str, delete: bool, only_plan: bool, as_json: bool, wait: float, limit: float, idle: bool
) -> None:
    """Do the merges that wait, and list the files that nothing needs."""
    found = connection().machine(machine)
    carry_out(found, GcRequest(delete), only_plan=only_plan, as_json=as_json, wait=wait, pace=Pace(limit, idle))
