"""What libvirt is at with a domain, by the name that people have for it."""

from __future__ import annotations

from snaptree.errors import BusyError
from snaptree.model.live import OFF, PAUSED
from snaptree.store.libvirt.binding import binding, explained
from snaptree.store.libvirt.calls import DomainHandle
from snaptree.store.libvirt.requests import targets

_LASTING = {"MIGRATION_IN": "a migration", "MIGRATION_OUT": "a migration", "DUMP": "a dump", "BACKUP": "a backup"}
"""What snaptree never has libvirt begin, and what may last as long as somebody wants it to."""
_SHORT = {
    "START": "a start",
    "SAVE": "a save",
    "RESTORE": "a restore",
    "SNAPSHOT": "a snapshot",
    "SNAPSHOT_REVERT": "going back to a snapshot",
    "SNAPSHOT_DELETE": "the deletion of a snapshot",
}
_ON_DISK = {
    "PULL": "a block pull",
    "COPY": "a block copy",
    "COMMIT": "a block commit",
    "ACTIVE_COMMIT": "a block commit",
}


def jobs(handle: DomainHandle) -> tuple[str, ...]:
    """What libvirt is at with it: a migration, a save, block jobs, each as a sentence."""
    libvirt, domain = binding(), handle._domain
    if handle.state() == OFF:
        return ()
    found: list[str] = []
    with explained(f"ask what jobs domain {handle.name} has"):
        try:
            kind = domain.jobInfo()[0]
        except libvirt.libvirtError:
            require_here(handle)
            raise
        if kind != libvirt.VIR_DOMAIN_JOB_NONE:
            found.append(f"{_named(handle, {**_LASTING, **_SHORT}) or 'a job'} is under way")
        names = {getattr(libvirt, f"VIR_DOMAIN_BLOCK_JOB_TYPE_{kind}"): name for kind, name in _ON_DISK.items()}
        for target in targets(handle.definition(live=True)):
            try:
                job = domain.blockJobInfo(target, 0)
            except libvirt.libvirtError:
                continue
            if job:
                found.append(f"{names.get(job['type'], 'a block job')} on {target} is under way")
    return tuple(found)


def require_here(handle: DomainHandle) -> None:
    """See that a domain of whose jobs libvirt tells nothing is not only just coming from another host.

    :raise BusyError: it is.
    """
    if handle.state() == PAUSED and handle.stands_for(binding().VIR_DOMAIN_PAUSED_MIGRATION):
        raise BusyError(f"libvirt is at work on domain {handle.name}: a migration is under way", hint_for(handle.name))


def require_short(handle: DomainHandle) -> None:
    """See that what libvirt is at, if it is, comes to its end by itself, and soon.

    :raise BusyError: it is what somebody else has begun, and may last.
    """
    if name := _named(handle, _LASTING):
        raise BusyError(f"libvirt is at work on domain {handle.name}: {name} is under way", hint_for(handle.name))


def hint_for(name: str) -> str:
    """What to do about a job."""
    return f"see 'virsh domjobinfo {name}' and 'virsh blockjob'; wait for its end, or abort it"


def _named(handle: DomainHandle, names: dict[str, str]) -> str | None:
    """The name of the domain's job, if it is one of these."""
    libvirt = binding()
    try:
        operation = handle._domain.jobStats().get(libvirt.VIR_DOMAIN_JOB_OPERATION)
    except libvirt.libvirtError:
        return None
    known = {getattr(libvirt, f"VIR_DOMAIN_JOB_OPERATION_{each}", None): name for each, name in names.items()}
    return known.get(operation) if operation is not None else None
