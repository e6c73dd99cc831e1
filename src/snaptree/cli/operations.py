"""``operations``, ``cancel``, ``pause``, ``resume``, ``limit``: what other processes are at, and steering them."""

from __future__ import annotations

import time
from typing import Any

import click

from snaptree.cli.connecting import connection
from snaptree.cli.output import print_json, say
from snaptree.cli.parsing import bytes_a_second, json_option, machine_argument
from snaptree.model.sizes import readable


def lasting(seconds: float) -> str:
    """A length of time for people: ``0:07``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def described(each: dict[str, Any]) -> list[str]:
    """One operation for people: a line, and what there is to say more."""
    name, state = each["machine"], each["state"]
    if state == "pending":
        return [f"{name}: {each['summary']} waits ('snaptree gc {name}')"]
    what = each["summary"] or each["operation"] or "an operation"
    if state == "waiting":
        what = f"{each['operation'] or 'a command'} waits for another operation to end"
    who = f", process {each['process']}" if each["process"] else ""
    who += f" of {each['user']}" if each["user"] else ""
    since = f", for {lasting(time.time() - each['started'])}" if each["started"] else ""
    lines = [f"{name}: {what} ({state}{who}{since})"]
    if state == "interrupted":
        lines.append(f"its process is gone: 'snaptree recover {name}' finishes or undoes it")
    if state == "unknown":
        lines.append("its process does not answer")
    if each["steps"]:
        lines.append(f"step {each['step']} of {each['steps']}: {each['doing']}")
    if each["bytes_total"]:
        parts = [f"{readable(each['bytes_moved'])} of {readable(each['bytes_total'])}"]
        parts += [f"{readable(each['bytes_per_second'])}/s"] if each["bytes_per_second"] else []
        parts += [f"{lasting(each['seconds_left'])} left"] if each["seconds_left"] is not None else []
        lines.append(", ".join(parts))
    if each["limit"]:
        lines.append(f"limited to {readable(each['limit'])}/s")
    lines += [f"then: {summary}" for summary in each["then"]]
    return [lines[0], *(f"  {line}" for line in lines[1:])]


def _print(found: tuple[dict[str, Any], ...], *, as_json: bool) -> None:
    if as_json:
        print_json(list(found))
        return
    for each in found:
        for line in described(each):
            say(line)


@click.command("operations")
@click.argument("machine", required=False)
@json_option
def operations_command(machine: str | None, as_json: bool) -> None:
    """List what is going on, by which process, how far it is, and what waits; on one machine or on all."""
    found = connection().operations(machine)
    _print(found, as_json=as_json)
    if not found and not as_json:
        say("nothing is going on" + (f" on machine {machine}" if machine else ""))


@click.command("cancel")
@machine_argument
@click.option("--all", "everything", is_flag=True, help="Also what waits for its turn on the machine.")
@json_option
def cancel_command(machine: str, everything: bool, as_json: bool) -> None:
    """Stop what runs on a machine, as Ctrl-C at its terminal does, and wait until it has stopped.

    A pull or a reflink is undone, a commit pauses and 'snaptree gc' goes on with it. Where nothing runs yet, what waits
    for its turn is cancelled.
    """
    found = connection().cancel(machine, everything=everything, told=lambda sentence: say(sentence, err=True))
    if as_json:
        print_json(list(found))
        return
    endings = {
        "undone": "it was undone",
        "paused": f"'snaptree gc {machine}' goes on",
        "not begun": "it had not begun",
        "interrupted": f"it failed on its way; 'snaptree recover {machine}' brings it to its end",
    }
    for each in found:
        how = endings["paused" if each["operation"] == "merge" and each["outcome"] == "undone" else each["outcome"]]
        say(f"{each['summary'] or each['operation'] or 'an operation'}: stopped; {how}")


@click.command("pause")
@machine_argument
@json_option
def pause_command(machine: str, as_json: bool) -> None:
    """Let what runs on a machine move no data until it is resumed. It keeps the machine to itself meanwhile."""
    _print(connection().pause(machine), as_json=as_json)


@click.command("resume")
@machine_argument
@json_option
def resume_command(machine: str, as_json: bool) -> None:
    """Let what was paused on a machine go on."""
    _print(connection().resume(machine), as_json=as_json)


@click.command("limit")
@machine_argument
@click.argument("rate")
@json_option
def limit_command(machine: str, rate: str, as_json: bool) -> None:
    """Let what runs on a machine move no more than RATE from now on, such as 200MiB/s; 'none' lifts the limit."""
    speed = 0.0 if rate == "none" else bytes_a_second(rate)
    _print(connection().limit(machine, speed), as_json=as_json)
