"""What can be planned for a machine that runs."""

from __future__ import annotations

from snaptree.errors import RefusedError
from snaptree.planning.adopt import AttachRequest, DetachRequest
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.sweep import SquashRequest
from snaptree.planning.verbs import DeleteBranchRequest, GcRequest


def require_possible(name: str, request: object) -> None:
    """Refuse what is not done yet while a machine runs.

    :raise RefusedError: says so.
    """
    match request:
        case SnapshotRequest() | DeleteRequest() | DeleteBranchRequest():
            return
        case AttachRequest() | DetachRequest() | RevertRequest() | SwitchRequest():
            return
        case SquashRequest() | GcRequest() | BranchRequest():
            return
    raise RefusedError(
        f"machine {name} is running, and this is not done while it runs yet", f"stop it first: 'snaptree stop {name}'"
    )
