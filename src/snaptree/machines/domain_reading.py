"""Reading a libvirt domain: its definition, libvirt's records, and the headers of all images that they name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

from msgspec import Struct
from msgspec.structs import replace

from snaptree.errors import SnaptreeError
from snaptree.images import gate
from snaptree.images.facts import read_facts
from snaptree.model.domain import Domain, DomainDisk, Record
from snaptree.model.live import OFF, Live
from snaptree.model.survey import LayerFacts, Outsider
from snaptree.model.tree import Tree
from snaptree.paths import device_at
from snaptree.planning.domain_tree import FoundTree, tree_of
from snaptree.store.libvirt.calls import DomainHandle
from snaptree.store.libvirt.reading import domain_of, record_of


class Reading(Struct, frozen=True):
    """A domain as libvirt has it at one moment."""

    domain: Domain
    records: tuple[Record, ...]
    current: str | None
    next: tuple[DomainDisk, ...]
    """The disks that it is started with next."""


def read(handle: DomainHandle) -> Reading:
    """Ask libvirt. Of a domain that runs, the disks are those that it runs on."""
    state = handle.state()
    resolve = handle.connection.volume
    domain = domain_of(
        handle.definition(live=state != OFF),
        handle.connection.uri,
        state,
        resolve,
        persistent=handle.is_persistent(),
        saved=handle.is_saved(),
    )
    next_disks = domain.disks
    if state != OFF and domain.persistent:
        # What snaptree notes is kept with what the domain is started from next.
        defined = domain_of(handle.definition(), "", state, resolve)
        domain, next_disks = replace(domain, hints=defined.hints), defined.disks
    records = tuple(record_of(text, resolve) for text in handle.records().values())
    return Reading(domain, records, handle.current(), next_disks)


def doubt(reading: Reading) -> tuple[str, str] | None:
    """What keeps one from knowing all that the domain's files are needed for, and what to do about it.

    A point in a pool that is not active would be taken for a file that nobody needs. What is started next may stand on
    what the running domain has left, and its definition is written again after each operation.
    """
    lost = [(f"domain {reading.domain.name}", each) for each in reading.domain.lost]
    lost += [(f"snapshot {record.name!r}", each) for record in reading.records for each in record.lost]
    for who, (pool, volume) in lost:
        return f"volume {volume} of pool {pool}, which {who} has, cannot be found", f"'virsh pool-start {pool}'"
    name = reading.domain.name
    now, then = ({disk.target: disk.path for disk in disks} for disks in (reading.domain.disks, reading.next))
    for target in sorted(now.keys() | then.keys()):
        if target not in then:
            hint = f"plug it in for good ('virsh attach-disk {name} … --config') or pull it out"
            return f"disk {target} was plugged in for this run only", hint
        if target not in now:
            hint = f"pull it out for good ('virsh detach-disk {name} {target} --config') or plug it in again"
            return f"disk {target} was pulled out for this run only", hint
        if now[target] != then[target]:
            hint = f"shut it down, or see to it with 'virsh edit {name}'"
            return f"disk {target} runs on {now[target]}, and is to be {then[target]} at the next start", hint
    return None


def found_tree(reading: Reading, name: str, known: Tree | None) -> FoundTree:
    """The domain's tree.

    :param name: by which the machine is known here.
    """
    reading = _by_one_name(reading)
    files = _files_of(reading)
    sizes: dict[str, int] = {}
    for record in reading.records:
        if record.memory is not None:
            with suppress(OSError):
                sizes[record.memory] = os.stat(record.memory).st_size
    domain = replace(reading.domain, name=name)
    return tree_of(domain, reading.records, reading.current, facts_of(files), known, sizes)


def _files_of(reading: Reading) -> list[tuple[str, str]]:
    """The images that the domain, now and at its next start, and its records name, and their formats."""
    files = {(disk.path, disk.format) for disk in (*reading.domain.disks, *reading.next)}
    return sorted(files.union(*(record.points.values() for record in reading.records)))


def _by_one_name(reading: Reading) -> Reading:
    """The same with each block device by one name, whatever its links: the definition's, or the first record's."""
    names: dict[int, str] = {}

    def named(path: str) -> str:
        number = device_at(path)
        return path if number is None else names.setdefault(number, path)

    disks = tuple(replace(disk, path=named(disk.path)) for disk in reading.domain.disks)
    records = tuple(
        replace(each, points={disk: (named(path), form) for disk, (path, form) in each.points.items()})
        for each in sorted(reading.records, key=lambda each: (each.created, each.name))
    )
    return replace(reading, domain=replace(reading.domain, disks=disks), records=records)


def facts_of(files: Iterable[tuple[str, str | None]]) -> dict[str, LayerFacts]:
    """What each image is, and each beneath it, by path; only headers are read, and nothing is raised.

    What cannot be followed has a ``problem``, and nothing beneath it.
    """
    found: dict[str, LayerFacts] = {}
    waiting = list(files)
    names = {number: path for path, _ in waiting if (number := device_at(path)) is not None}
    while waiting:
        path, image_format = waiting.pop()
        if path in found:
            continue
        facts = read_facts(path, image_format)
        if facts.backing is not None:
            try:
                backing = gate.resolve_backing(path, facts.backing)
                # A device by the name that the domain gives it: a header may have another one of its links, or none.
                number = device_at(backing)
                facts = replace(facts, backing=names.setdefault(number, backing) if number is not None else backing)
            except SnaptreeError as error:
                facts = replace(facts, backing=None, problem=facts.problem or "changed", detail=error.message)
        found[path] = facts
        if facts.backing is not None:
            waiting.append((facts.backing, facts.backing_format))
    return found


def live_of(reading: Reading, tree: Tree) -> Live | None:
    """The QEMU of a domain that runs, as far as its disks are concerned."""
    if reading.domain.state == OFF:
        return None
    tips = tree.active_branch.tips.values()
    opened = frozenset(layer.id for tip in tips for layer in tree.chain(tip.layer))
    return Live(reading.domain.state, 0, opened, transient=not reading.domain.persistent)


def other_domains_on(handle: DomainHandle, tree: Tree) -> tuple[Outsider, ...]:
    """The other domains of the connection that stand on layers of this one, by their disks or their snapshots."""
    owned = {os.path.realpath(layer.path): layer.id for layer in tree.layers.values() if layer.owned}
    found: list[Outsider] = []
    for other in handle.connection.domains():
        if other.uuid == handle.uuid:
            continue
        try:
            reading = read(other)
        except SnaptreeError:
            # It has just been undefined, or is being changed; what is on its disks is seen by the files beside ours.
            continue
        for path in set(map(os.path.realpath, facts_of(_files_of(reading)))) & set(owned):
            found.append(Outsider(owned[path], f"domain {reading.domain.name!r}"))
    return tuple(found)
