"""Going to other tips with a machine that runs: it is turned off for it, and started again on them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from snaptree.errors import SnaptreeError
from snaptree.machines import due
from snaptree.machines.power import Power
from snaptree.model.live import OFF
from snaptree.model.tree import Tree
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest, SwitchRequest, target_of

if TYPE_CHECKING:
    from snaptree.machines.standalone import Standalone
    from snaptree.qemu.running import RunningQemu


class Going(Struct, frozen=True):
    """What the machine does before and after; one of them is not ``off``."""

    before: str
    after: str

    def told(self, plan: Plan) -> Plan:
        """The plan that also says what happens to the machine."""
        notes = [] if self.before == OFF else ["the machine is turned off, as by pulling the plug"]
        notes += [] if self.after == OFF else [f"the machine is started on its new disks, and is {self.after} then"]
        return replace(plan, notes=(*plan.notes, *notes), estimate=self.before != OFF)

    def note(self, machine: Standalone) -> None:
        """Keep what the machine does now, if it can be started, and what it is to do afterwards."""
        from snaptree.machines import switching

        with suppress(SnaptreeError):
            switching.require_startable(machine, machine.tree())
            due.note(machine.database, machine.name, self.before, self.after)

    async def turn_off(self, qemu: RunningQemu | None, tree: Tree) -> None:
        """Turn the machine off."""
        if qemu is not None:
            from snaptree.machines import switching

            await switching.turn_off(qemu, tree)


@asynccontextmanager
async def or_back(go_on: Callable[[], Awaitable[bool]], unfinished: Callable[[], object]) -> AsyncIterator[None]:
    """Whatever fails in the block, the machine does afterwards what it is to; what has not come to its end is
    recovery's.

    :param go_on: has it do that.
    """
    try:
        yield
    except BaseException as error:
        if not unfinished():
            try:
                await go_on()
            except SnaptreeError as failed:
                if not isinstance(error, SnaptreeError):
                    raise
                more = f"the machine was turned off, and cannot be started again: {failed.message}"
                error.hint = f"{error.hint}; {more}" if error.hint else more
        raise


def going(machine: Standalone, request: object, power: Power, tree: Tree) -> Going | None:
    """What a request to go elsewhere does to the machine; ``None`` when it is off and stays so.

    Whether it could be started again is seen to before anything is touched.

    :raise SnaptreeError: it could not.
    """
    if not isinstance(request, RevertRequest | SwitchRequest):
        return None
    if target_of(tree, request) is None:
        # Planning says what there is instead.
        return None
    after = request.power or power.state
    if power.state == after == OFF:
        return None
    if after != OFF:
        from snaptree.machines import switching

        switching.require_startable(machine, tree)
    return Going(power.state, after)
