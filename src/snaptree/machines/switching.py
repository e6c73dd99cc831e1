"""Starting a machine from its stored command, and stopping it."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

from snaptree.errors import BusyError, RefusedError, SnaptreeError, UsageError
from snaptree.images import durable
from snaptree.machines import due
from snaptree.machines.asking import for_recovery, match
from snaptree.machines.power import WORK_SECONDS, Power, monitor_of, own_monitor, written_by
from snaptree.model.live import OFF, PAUSED
from snaptree.model.machine import MachineConfig
from snaptree.model.tree import Tree
from snaptree.planning.health import ailments, require_whole
from snaptree.planning.naming import renamed_roots
from snaptree.planning.plan import Plan
from snaptree.planning.verbs import PutBackRequest
from snaptree.qemu import launching
from snaptree.qemu.ending import QUIT_SECONDS, end, has_ended
from snaptree.qemu.launching import Chain
from snaptree.qemu.running import RunningQemu
from snaptree.running.opening import require_files
from snaptree.store import trees

if TYPE_CHECKING:
    from snaptree.machines.standalone import Standalone

GONE_SECONDS = 30.0
"""So long its images may stay locked after its end."""


def command_line(config: MachineConfig, tree: Tree) -> list[str]:
    """What starts the machine: its stored command with the active tips filled in.

    :raise UsageError: no command is stored, or it cannot be used.
    """
    if config.start is None:
        hint = f"store one: snaptree set {config.name} --start 'qemu-system-x86_64 -m 2048 …'"
        raise UsageError(f"machine {config.name} has no start command", hint)
    disks: Mapping[str, Chain] = {
        disk: [(each.id, each.path, each.format) for each in tree.chain(point.layer)]
        for disk, point in sorted(tree.active_branch.tips.items())
    }
    return launching.command_line(config.start, disks, secrets.token_hex(6), config.keys)


def start_plan(machine: Standalone) -> Plan:
    """What :func:`start` would do, as a plan without steps: nothing of it is ever undone or finished."""
    tree = machine.tree()
    words = command_line(machine.config, tree)
    return Plan("start", f"start machine {machine.name!r}", (), 0, tree, notes=(shlex.join(words),))


def start(machine: Standalone, *, wait: float = 0.0) -> str:
    """Start the machine on its active tips; what it does then, ``running`` or ``paused``.

    :raise BusyError: it runs already, or another operation has it.
    :raise RefusedError: its monitor is one that somebody else's QEMU has.
    :raise ToolError: QEMU does not start.
    :raise UnhealthyError: something is wrong with a layer that it needs.
    """
    return asyncio.run(_start(machine, wait))


async def _start(machine: Standalone, wait: float) -> str:
    with durable.explained(f"a file of machine {machine.name}", "use"), machine.locked(wait) as lock:
        await machine.settle(lock)
        config = machine.config = trees.load_config(machine.database, machine.name)
        tree = machine.tree()
        async with machine.asked(tree) as (power, _):
            if power.state != OFF:
                why = power.why or "it answers on its monitor"
                raise BusyError(f"machine {config.name} is {power.state} already: {why}", power.hint)
        require_startable(machine, tree)
        state = await launch(machine, tree)
        due.forget(machine.database, machine.name)
        return state


def require_startable(machine: Standalone, tree: Tree) -> None:
    """See that the machine could be started, before anything is touched.

    :raise RefusedError: it is one that the user starts, and how is not known; or its folder is gone.
    :raise UsageError: it has no start command, or one that cannot be used.
    """
    config = machine.config
    if config.qmp is not None and config.start is None:
        hint = f"start it as you do, or say how: 'snaptree set {config.name} --start …'"
        raise RefusedError(f"machine {config.name} is one that you start: its monitor is {config.qmp}", hint)
    folder = config.folder or "/"
    if not os.path.isdir(folder):
        hint = f"store the command again: 'snaptree set {config.name} --start …'"
        raise RefusedError(f"there is no folder {folder} any more, in which the start command was stored", hint)
    command_line(config, tree)
    tips = tree.active_branch.tips.values()
    require_files(((each.path, each.format) for tip in tips for each in tree.chain(tip.layer)), config.keys)


async def launch(machine: Standalone, tree: Tree, *, paused: bool = False) -> str:
    """Start the machine, under its lock; what it does then.

    :raise ToolError: QEMU does not start.
    :raise UnhealthyError: something is wrong with a layer that it needs.
    """
    config = machine.config
    words = command_line(config, tree) + (["-S"] if paused else [])
    found = ailments(tree, machine.survey(tree, Power(OFF), beside=False))
    for point in tree.active_branch.tips.values():
        require_whole(tree, found, point.layer, f"start machine {config.name}")
    monitor = own_monitor(machine.database, config.name)
    qemu = await launching.launch(words, monitor, config.folder or "/", monitor.removesuffix(".sock") + ".log")
    try:
        match(await qemu.graph(), tree, monitor)
        return await qemu.state()
    except BaseException:
        await end(qemu)
        raise
    finally:
        await qemu.close()


def stop_plan(machine: Standalone, *, force: bool) -> Plan:
    """What :func:`stop` would do, as a plan without steps."""
    tree = machine.tree()
    state = machine.power(tree).state
    how = "nothing to do" if state == OFF else "turn it off at once" if force else "ask the guest to shut down"
    return Plan("stop", f"stop machine {machine.name!r}", (), 0, tree, notes=(f"it is {state}: {how}",))


def stop(machine: Standalone, *, seconds: float, force: bool = False, wait: float = 0.0) -> str:
    """Ask the guest to shut down, and turn it off by force when it has not done so in time; how it ended.

    :param force: turn it off at once.
    :raise RefusedError: it is paused, so that it cannot hear us.
    :raise BusyError: its monitor tells us nothing, or another operation has the machine.
    """
    said = asyncio.run(_stop(machine, seconds, wait, force=force))
    if renamed_roots(machine.tree()):
        machine.run(PutBackRequest(), wait=wait)
    return said


async def _stop(machine: Standalone, seconds: float, wait: float, *, force: bool) -> str:
    with durable.explained(f"a file of machine {machine.name}", "use"), machine.locked(wait) as lock:
        await machine.settle(lock)
        config, tree = trees.load_config(machine.database, machine.name), machine.tree()
        due.forget(machine.database, machine.name)
        async with machine.asked(tree, WORK_SECONDS) as (power, qemu):
            if qemu is None and power.state == OFF:
                return "it was off"
            async with AsyncExitStack() as stack:
                own = own_monitor(machine.database, config.name)
                if qemu is None and monitor_of(machine.database, config) == own:
                    # One that we have started is this machine whatever was done to its disks.
                    with suppress(SnaptreeError):
                        qemu = await for_recovery(machine.database, config, tree)
                    if qemu is not None:
                        stack.push_async_callback(qemu.close)
                if qemu is None:
                    raise BusyError(f"machine {config.name} cannot be stopped: {power.why}", power.hint)
                ended = os.pidfd_open(qemu.pid)
                stack.callback(os.close, ended)
                forced = force or not await _shut_down(qemu, config.name, ended, seconds)
                if forced:
                    await end(qemu, ended)
        await _wait_until_free(tree)
        durable.remove_small(own)
        return "it was turned off" if forced else "it has shut down"


async def turn_off(qemu: RunningQemu, tree: Tree) -> None:
    """End the machine's QEMU, as by pulling the plug, and wait until its images are free."""
    await end(qemu)
    await _wait_until_free(tree)


async def _shut_down(qemu: RunningQemu, name: str, ended: int, seconds: float) -> bool:
    """Whether the guest has shut down in time."""
    if await qemu.run_state() == "shutdown":
        return False
    if await qemu.state() == PAUSED:
        hint = "let it run first, or turn it off with --force"
        raise RefusedError(f"machine {name} is paused, and cannot be asked to shut down", hint)
    await qemu.qmp.execute("system_powerdown")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if await has_ended(ended, 0.1):
            return True
        try:
            if await qemu.run_state() == "shutdown":
                # The guest has; QEMU was told to stay (-no-shutdown).
                await end(qemu, ended)
                return True
        except SnaptreeError:
            return await has_ended(ended, QUIT_SECONDS)
    return False


async def _wait_until_free(tree: Tree) -> None:
    """Wait until nobody has the tips open any more: QEMU gives its locks up when it has ended."""
    deadline = time.monotonic() + GONE_SECONDS
    while writer := written_by(tree):
        if time.monotonic() > deadline:
            raise BusyError(f"QEMU has ended, but {writer} has a disk open", "see what has started since")
        await asyncio.sleep(0.01)
