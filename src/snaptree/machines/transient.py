"""Transient domains: libvirt has no definition of one, and forgets it with its snapshots' records when it ends."""

from __future__ import annotations

from snaptree.errors import RefusedError
from snaptree.model.domain import Domain
from snaptree.model.live import OFF
from snaptree.planning.create import BranchRequest
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.verbs import RemoveRequest, Request


def require_lasting(domain: Domain, request: Request) -> None:
    """See that a domain which would not outlive what is asked for is persistent.

    :raise RefusedError: it is transient; says how to change that.
    """
    if domain.persistent:
        return
    name = domain.name
    hint = (
        f"make it persistent first: 'virsh dumpxml {name} --inactive --security-info > {name}.xml', then "
        f"'virsh define {name}.xml'"
    )
    if domain.state == OFF:
        # libvirt 11.3 keeps one so when going back to a snapshot with virsh has failed half-way.
        raise RefusedError(f"domain {name} is transient and off: libvirt can do nothing with it any more", hint)
    if isinstance(request, RevertRequest | SwitchRequest):
        raise RefusedError(
            f"domain {name} is transient: going elsewhere turns it off, and libvirt forgets it then with its snapshots",
            hint,
        )
    if isinstance(request, BranchRequest) and request.source is None:
        raise RefusedError(f"domain {name} is transient, and forks where it stands only while it is off", hint)
    if isinstance(request, RemoveRequest):
        raise RefusedError(
            f"domain {name} is transient: libvirt forgets it, and its snapshots, by itself when it ends",
            f"'virsh shutdown {name}'; its files stay",
        )
