"""Saving the memory of a running QEMU: forms, capabilities, and waiting for it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from msgspec import Struct, field

from snaptree.errors import CancelledError, SnaptreeError, ToolError
from snaptree.model.memory import BACKGROUND, FINISHING, MAPPED, PLAIN, SLEEPING
from snaptree.qemu.running import RunningQemu, run_state
from snaptree.qemu.session import QmpSession, explain, sense

CAPABILITIES = {BACKGROUND: "background-snapshot", MAPPED: "mapped-ram"}
"""QEMU's name for each form; the plain one has none."""
_SINCE_8_1 = "switchover-ack"
"""A capability of QEMU 8.1 and later. In an older one a guest whose memory is being saved in the background hangs for
ever when that is cancelled or fails, since its pages stay write-protected, and a paused one goes on by itself (7.2.22).
"""
FREELY = 10 << 30
"""Bytes a second, as no limit: QEMU's default would slow the saving down."""
QUIET_SECONDS, STALL_SECONDS, CANCEL_SECONDS = 30.0, 60.0, 30.0
"""So long a migration of before may take to be gone, this one may make no progress, and may take to be cancelled."""
LOAD_SECONDS = 300.0
"""So long a memory may take to load: QEMU says nothing meanwhile."""
_OVER = ("none", "completed", "failed", "cancelled")
_LOST = {
    "postmigrate": "it has been saved already, and QEMU saves no more until the machine has run",
    "shutdown": "the guest has shut down, which QEMU would forget",
    "guest-panicked": "the guest has panicked, which QEMU would forget",
    "internal-error": "the guest could not go on, which QEMU would forget",
}
"""Run states that a machine cannot be saved in: it would be in ``postmigrate`` afterwards, whatever the form."""


class Settings(Struct, frozen=True):
    """The migration settings of a QEMU as its user has them."""

    capabilities: Mapping[str, bool]
    parameters: Mapping[str, Any]

    def text(self) -> str:
        """As the journal keeps it."""
        return json.dumps({"capabilities": dict(self.capabilities), "parameters": dict(self.parameters)})

    @classmethod
    def parse(cls, text: str) -> Settings:
        """What :meth:`text` gave."""
        found = json.loads(text)
        return cls(found["capabilities"], found["parameters"])


class State(Struct, frozen=True):
    """How far a migration has come. ``pages`` are those of RAM that were written; sizes are in bytes."""

    status: str
    pages: int = 0
    written: int = 0
    error: str = ""


class Followed(Struct):
    """What the waiting for a migration is told by, and tells."""

    report: Callable[[int], None] = lambda written: None
    cancelled: Callable[[], bool] = lambda: False
    _seen: int = -1
    _since: float = field(default_factory=time.monotonic)

    def look(self, name: str, state: State) -> None:
        """Look at one state on the way.

        :raise CancelledError: it is to be stopped.
        :raise ToolError: it stands still.
        """
        if self.cancelled():
            raise CancelledError("stopped while memory was being saved")
        if state.written != self._seen:
            self._seen, self._since = state.written, time.monotonic()
        elif time.monotonic() - self._since > STALL_SECONDS:
            raise ToolError(f"{name} saves nothing for {STALL_SECONDS:.0f} s", "look at the kernel's log for the disk")
        self.report(state.written)


async def settings(qmp: QmpSession) -> Settings:
    """The settings as they are.

    :raise ToolError: the answer makes no sense.
    """
    capabilities = await qmp.execute("query-migrate-capabilities")
    parameters = await qmp.execute("query-migrate-parameters")
    with sense(qmp.name, "migration settings", [capabilities, parameters]):
        known = {str(each["capability"]): bool(each["state"]) for each in capabilities}
        ours = {name: parameters[name] for name in ("max-bandwidth", "direct-io") if name in parameters}
        return Settings(known, ours)


def forms_known(found: Settings) -> tuple[str, ...]:
    """The forms that a QEMU with these settings knows, and can be trusted with, the best first."""
    known = found.capabilities
    unsafe = () if _SINCE_8_1 in known else (BACKGROUND,)
    return (*(form for form, name in CAPABILITIES.items() if name in known and form not in unsafe), PLAIN)


def allowed(state: str, forms: Collection[str]) -> tuple[str, ...]:
    """Those of the forms that a machine in a run state can be saved in.

    A guest that sleeps does so only in the background: saved otherwise it cannot be woken up any more, and QEMU ends
    itself when it is told to go on (10.0.2: "invalid runstate transition: 'postmigrate' -> 'suspended'").
    """
    if state in _LOST:
        return ()
    return tuple(form for form in forms if form == BACKGROUND or state != SLEEPING)


def obstacle(state: str) -> str:
    """Why a machine in a run state cannot be saved, in a form that it is not allowed."""
    return _LOST.get(state, "the guest sleeps, and could not be woken up any more")


async def use(qmp: QmpSession, before: Settings, form: str, speed: int) -> None:
    """Set everything as the form needs it; whatever else the user has switched on may not go with it.

    Two forms at once would be accepted, and could not be loaded: what is not wanted is switched off first.

    :param speed: bytes a second, 0 for no limit.
    :raise ToolError: this QEMU cannot save in that form here.
    """
    wanted = CAPABILITIES.get(form)
    now = await settings(qmp)
    off = [name for name, state in now.capabilities.items() if state and name not in (wanted, "events")]
    for names, state in ((off, False), ([wanted] if wanted else [], True)):
        if names:
            said = [{"capability": name, "state": state} for name in names]
            await qmp.execute("migrate-set-capabilities", capabilities=said)
    parameters: dict[str, Any] = {"max-bandwidth": speed or FREELY}
    if before.parameters.get("direct-io"):
        parameters["direct-io"] = False
    await qmp.execute("migrate-set-parameters", **parameters)


async def restore(qmp: QmpSession, before: Settings) -> None:
    """Set everything as the user had it.

    :raise ToolError: QEMU refuses.
    """
    now = await settings(qmp)
    # What excludes something else is switched off before that is switched on.
    for state in (False, True):
        changed = [
            {"capability": name, "state": state}
            for name, was in before.capabilities.items()
            if was is state and now.capabilities.get(name) is not state
        ]
        if changed:
            await qmp.execute("migrate-set-capabilities", capabilities=changed)
    parameters = {name: value for name, value in before.parameters.items() if now.parameters.get(name) != value}
    if parameters:
        await qmp.execute("migrate-set-parameters", **parameters)


async def quiet(qemu: RunningQemu, *, seconds: float = QUIET_SECONDS) -> None:
    """Wait until no migration of before is left: another one soon after it fails, or wedges QEMU.

    :raise ToolError: one is.
    """
    deadline = time.monotonic() + seconds
    commands = await qemu.commands()
    while True:
        state = await query(qemu.qmp)
        left = await qemu.qmp.execute("query-yank") if "query-yank" in commands else []
        with sense(qemu.qmp.name, "list of what can be yanked", left):
            migrates = any(each.get("type") == "migration" for each in left)
        if state.status in _OVER and not migrates:
            return
        if time.monotonic() > deadline:
            raise ToolError(f"{qemu.qmp.name} is migrating ({state.status})", "wait until that has ended")
        await asyncio.sleep(0.01)


async def query(qmp: QmpSession) -> State:
    """How far the migration is.

    :raise ToolError: the answer makes no sense.
    """
    answer = await qmp.execute("query-migrate")
    with sense(qmp.name, "state of its migration", answer):
        ram = answer.get("ram", {})
        pages, written = int(ram.get("normal", 0)) + int(ram.get("duplicate", 0)), int(ram.get("transferred", 0))
        return State(str(answer.get("status", "none")), pages, written, str(answer.get("error-desc", "")))


def _require_no_failure(qmp: QmpSession, state: State) -> None:
    if state.status in ("failed", "cancelled", "cancelling", "none"):
        raise explain(f"{qmp.name} cannot save its memory", state.error or f"the migration was {state.status}")


async def until_instant(qmp: QmpSession, form: str, followed: Followed) -> None:
    """Wait until the guest may go on: in the background form when all is write-protected, which shows by the first page
    that is saved; in the others when all is saved.

    Bytes alone say nothing: a header is written before QEMU has stopped the guest itself (10.0.2).

    :raise SnaptreeError: it failed, stands still, or was cancelled.
    """
    while True:
        state = await query(qmp)
        _require_no_failure(qmp, state)
        if form == BACKGROUND and state.pages > 0:
            return
        if state.status == "completed":
            await _until_finished(qmp)
            return
        followed.look(qmp.name, state)
        await asyncio.sleep(0.0005 if form == BACKGROUND else 0.005)


async def _until_finished(qmp: QmpSession) -> None:
    """Wait until the guest may be told to go on: an older QEMU says that all is saved a moment before (7.2.22)."""
    deadline = time.monotonic() + CANCEL_SECONDS
    while await run_state(qmp) == FINISHING and time.monotonic() < deadline:
        await asyncio.sleep(0.002)


async def until_done(qmp: QmpSession, followed: Followed) -> None:
    """Wait until all is saved.

    :raise SnaptreeError: it failed, stands still, or was cancelled.
    """
    pause = 0.002
    while True:
        state = await query(qmp)
        _require_no_failure(qmp, state)
        if state.status == "completed":
            return
        followed.look(qmp.name, state)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 0.1)


async def abandon(qmp: QmpSession) -> bool:
    """Cancel whatever is being saved, and wait until it has ended; a peer that went away has ended too.

    :return: whether it is known to have ended.
    """
    deadline = time.monotonic() + CANCEL_SECONDS
    with suppress(SnaptreeError):
        if (await query(qmp)).status not in _OVER:
            await qmp.execute("migrate_cancel")
        while (await query(qmp)).status not in _OVER:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.005)
        await _until_finished(qmp)
        return True
    return False


async def load(qmp: QmpSession, uri: str, form: str) -> None:
    """Have a QEMU that was started for it load a memory, and wait until it has.

    :raise ToolError: it cannot.
    """
    if form == MAPPED:
        said = [{"capability": CAPABILITIES[MAPPED], "state": True}]
        await qmp.execute("migrate-set-capabilities", capabilities=said)
    try:
        await qmp.execute("migrate-incoming", uri=uri, exit_on_error=False)
    except ToolError as error:
        # Before QEMU 9.1 it ends when it cannot load.
        if "exit-on-error" not in error.message:
            raise
        await qmp.execute("migrate-incoming", uri=uri)
    since, seen = time.monotonic(), -1
    while True:
        state = await query(qmp)
        if state.status == "failed":
            raise ToolError(f"the memory cannot be loaded: {state.error or 'QEMU does not say why'}")
        if state.status == "completed" and await run_state(qmp) != "inmigrate":
            return
        if state.written != seen:
            since, seen = time.monotonic(), state.written
        elif time.monotonic() - since > LOAD_SECONDS:
            raise ToolError(
                f"QEMU has loaded nothing for {LOAD_SECONDS:.0f} s", "look at the kernel's log for the disk"
            )
        await asyncio.sleep(0.005)


class Lent(Struct):
    """A file of ours that QEMU has been given, until :meth:`take_back`."""

    qmp: QmpSession
    uri: str
    undo: tuple[str, Mapping[str, Any]] | None

    async def take_back(self) -> None:
        """Have QEMU close what it was given, if it has not."""
        if self.undo is not None:
            command, arguments = self.undo
            with suppress(SnaptreeError):
                await self.qmp.execute(command, **arguments)


async def lend(qemu: RunningQemu, descriptor: int, known: Sequence[str]) -> Lent:
    """Give QEMU an open file to save into or to load from.

    :param known: the forms that it knows; one that knows ``mapped-ram`` takes files by name and offset, an older one as
        a pipe.
    :raise ToolError: it refuses.
    """
    qemu.pass_descriptor(descriptor)
    if MAPPED in known:
        answer = await qemu.qmp.execute("add-fd", opaque="snaptree")
        with sense(qemu.qmp.name, "number of a file", answer):
            number = int(answer["fdset-id"])
        return Lent(qemu.qmp, f"file:/dev/fdset/{number}", ("remove-fd", {"fdset_id": number}))
    await qemu.qmp.execute("getfd", fdname="snaptree")
    return Lent(qemu.qmp, "fd:snaptree", ("closefd", {"fdname": "snaptree"}))
