"""Another way where a guest writes faster than its disk is committed: its data is pulled up instead.

A pull always comes to its end, since what the guest writes meanwhile need not be moved.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from snaptree.errors import OutrunError
from snaptree.planning.live_steps import LiveMerge
from snaptree.planning.plan import Plan
from snaptree.planning.sweep import SquashRequest
from snaptree.planning.verbs import Request
from snaptree.store import operations

if TYPE_CHECKING:
    from snaptree.machines.standalone import Standalone
    from snaptree.qemu.running import RunningQemu
    from snaptree.running.executor import Outcome


def _rows(plan: Plan) -> tuple[SquashRequest, ...]:
    """Pulls of what the plan was to commit out of the guest's tips; a root keeps its format."""
    jobs = [job for each in plan.every() for step in each.steps if isinstance(step, LiveMerge) for job in step.jobs]
    return tuple(
        SquashRequest(job.disk, top=job.row[-1][0], base=job.row[0][0], merge="pull")
        for job in jobs
        if job.active and job.row[0][1] == job.row[-1][1]
    )


async def pull_instead(
    machine: Standalone,
    error: OutrunError,
    plan: Plan,
    request: Request,
    run: Callable[[Plan], Awaitable[Outcome]],
    qemu: RunningQemu | None,
) -> Outcome:
    """Carry out pulls instead of the commits that the guest has outrun, on the same files, which are locked.

    :param run: carries out a plan.
    :raise OutrunError: the user asked for a commit, nothing can be pulled, or another disk's guest has gone over
        already: recovery goes on with the rest.
    """
    from snaptree.machines.asking import again

    rows = _rows(plan)
    asked, begun = getattr(request, "merge", "auto") == "commit", operations.unfinished(machine.database, machine.name)
    if asked or begun or not rows or qemu is None:
        raise error
    said = ["the guest wrote faster than its disk was committed: its data was pulled up instead"]
    for row in rows:
        tree = machine.tree()
        pull = machine.plan_with(tree, await again(qemu, tree), row)
        outcome = await run(pull)
        said += [note for each in pull.every() for note in each.notes]
    outcome.said = [*said, *outcome.said]
    return outcome
