"""Making libvirt's records, the domain's definition and its metadata say what the tree says; repeatable.

The order is such that at any moment each record's files are there, and that a name which goes is still there when what
hangs on it has moved: new and changed records, parents first, the current one as such; then what goes. Dropping a
record changes others (libvirt gives them the parent's files), and so does another one's becoming current (it drops
``revertDisks``), so that all is compared once more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping

from msgspec import Struct

from snaptree.errors import ToolError
from snaptree.model.tree import Tree
from snaptree.planning.records import Wanted, wanted_records
from snaptree.store.libvirt import writing, xml
from snaptree.store.libvirt.calls import DomainHandle
from snaptree.store.libvirt.memory import DomainMemory
from snaptree.store.libvirt.writing import Going
from snaptree.store.libvirt.xml import Element

ROUNDS = 4
"""So often all is compared until nothing differs."""
Keep = Callable[[str, str], None]


NOTHING_YET = "the domain's metadata has nothing of snaptree's yet"


class Difference(Struct, frozen=True):
    """What libvirt has to be told.

    ``records`` are the records to write, parents first; ``current`` is the name of the one that must become current.
    """

    definition: str | None
    records: tuple[tuple[str, str], ...]
    current: str | None
    gone: tuple[str, ...]
    again: frozenset[str] = frozenset()
    """Those that libvirt takes only in the place of one that is not there: their memory has gone."""
    noted: str | None = None
    """What snaptree is to keep in the metadata of a domain that has no definition."""
    stale: tuple[str, ...] = ()
    """What of the definition is not as the tree is, in sentences."""

    def __bool__(self) -> bool:
        return bool(self.definition or self.noted or self.records or self.current or self.gone)

    def sentences(self) -> tuple[str, ...]:
        """What differs, for people."""
        said = list(self.stale) if self.definition or self.noted else []
        said += [f"libvirt's record of {name!r} does not say what the tree says" for name, _ in self.records]
        said += [f"libvirt does not take {self.current!r} for the current snapshot"] if self.current else []
        said += [f"libvirt has a record of {name!r}, which is not in the tree" for name in self.gone]
        return tuple(said)


def difference(
    handle: DomainHandle,
    tree: Tree,
    renamed: Mapping[str, str] | None = None,
    kept: Mapping[str, str] | None = None,
    known: Collection[str] | None = None,
    going: Going | None = None,
) -> Difference:
    """What libvirt has to be told of the tree.

    :param renamed: names by the names that records had before.
    :param kept: XML of records that were dropped to be written anew, by name.
    :param known: the records that may be dropped, besides a placeholder; all without it.
    :param going: what changes of what is noted of internal snapshots.
    """
    resolve = handle.connection.volume
    definition = xml.parse(handle.definition(secure=True), "the domain's definition")
    texts = handle.records(secure=True)
    there = set(texts)
    texts = {**(kept or {}), **texts}
    before = {name: xml.parse(text, f"the record of {name!r}") for name, text in texts.items()}
    wanted = wanted_records(tree)
    sources = dict(before)
    for old, new in (renamed or {}).items():
        if old in before and new not in there:
            sources[new] = before[old]
    changed: list[tuple[str, str]] = []
    again: set[str] = set()
    for each in wanted:
        source = sources.get(each.name)
        if source is None and each.memory is not None:
            source = _of_memory(handle, tree, each.memory, before)
        now = writing.record(source, definition, each, tree, resolve)
        if each.name in there and _lost_memory(before[each.name], each):
            again.add(each.name)
        if each.name in again or (source is not None and _lost_memory(source, each)):
            _drop_memory(now)
        if each.name not in there or not xml.same(now, before[each.name]):
            changed.append((each.name, xml.text_of(now)))
    domain = writing.definition(definition, tree, before.values(), resolve, going)
    current = next((each.name for each in wanted if each.current), None)
    # A transient one would become persistent; what it runs on QEMU has, and libvirt knows.
    lasts = handle.is_persistent()
    noted, before_noted = xml.own(domain, "domain"), xml.own(definition, "domain")
    kept_so = before_noted is not None and xml.same(noted, before_noted)
    return Difference(
        definition=None if not lasts or xml.same(domain, definition) else xml.text_of(domain),
        noted=None if lasts or kept_so else xml.text_of(noted),
        stale=_stale(definition, domain, kept_so=kept_so),
        records=tuple(changed),
        current=current if current != handle.current() else None,
        gone=tuple(
            sorted(
                name
                for name in there - {each.name for each in wanted}
                if known is None or name in known or writing.is_placeholder(before[name])
            )
        ),
        again=frozenset(again),
    )


def _stale(before: Element, after: Element, *, kept_so: bool) -> tuple[str, ...]:
    """What of a definition is not as the tree is.

    :param kept_so: what snaptree keeps in its metadata is.
    """
    said = [] if kept_so else ["what snaptree keeps in the domain's metadata is not what the tree says"]
    if xml.own(before, "domain") is None:
        said = [NOTHING_YET]
    wanted = dict(xml.disks(after))
    for target, disk in xml.disks(before):
        if disk.find("backingStore") is not None and wanted[target].find("backingStore") is None:
            said.append(
                f"the domain's definition says what {target} stands on, and libvirt believes that, not the header"
            )
    return tuple(said) or ("the domain's definition does not say what the tree says",)


def _of_memory(handle: DomainHandle, tree: Tree, path: str, records: Mapping[str, Element]) -> Element:
    """What a new record with a memory is made of: another record that has it, or the domain in the memory file."""
    memory = next(each for each in tree.memories.values() if each.path == path)
    for record in records.values():
        kept = record.find("memory")
        domain = record.find("domain")
        if domain is not None and kept is not None and os.path.realpath(kept.get("file", "")) == path:
            found = writing.with_memory(domain, memory, record.find("cookie"))
            inactive = record.find("inactiveDomain")
            if inactive is not None:
                found.find("domain").addnext(xml.clone(inactive))
            return found
    return writing.with_memory(xml.parse(DomainMemory(handle).definition(path), f"the domain in {path}"), memory)


def _lost_memory(before: Element, wanted: Wanted) -> bool:
    memory = before.find("memory")
    return wanted.memory is None and memory is not None and memory.get("snapshot") == "external"


def _drop_memory(record: Element) -> None:
    """Let a record be one of disks only: libvirt goes back to it as to a machine that was switched off."""
    memory = record.find("memory")
    if memory is not None:
        memory.attrib.clear()
        memory.set("snapshot", "no")
    xml.put_text(record, "state", "disk-snapshot")
    xml.put_text(record, "cookie", None)


def apply(
    handle: DomainHandle,
    tree: Tree,
    renamed: Mapping[str, str] | None = None,
    *,
    keep: Keep = lambda name, text: None,
    kept: Mapping[str, str] | None = None,
    known: Collection[str] | None = None,
    going: Going | None = None,
) -> None:
    """Tell libvirt what the tree says.

    :param keep: keeps, durably, a record that must be dropped before it can be written anew.
    :param kept: what was kept so, by a process that was killed.
    :param known: the records that may be dropped, besides a placeholder; all without it.
    :param going: what changes of what is noted of internal snapshots.
    :raise ToolError: libvirt refuses something, or does not keep what it is told.
    """
    kept = dict(kept or {})
    for _ in range(ROUNDS):
        found = difference(handle, tree, renamed, kept, known, going)
        if not found:
            return
        if found.definition is not None:
            handle.define(found.definition)
        if found.noted is not None:
            handle.annotate("domain", xml.parse(found.noted, "what is noted"))
        texts = dict(found.records)
        for name in found.again:
            keep(name, texts[name])
            kept[name] = texts[name]
            handle.forget_record(name)
        for name, text in found.records:
            handle.redefine(text, name, current=name == found.current)
        if found.current is not None and found.current not in texts:
            handle.redefine(handle.records(secure=True)[found.current], found.current, current=True)
        for name in found.gone:
            handle.forget_record(name)
    left = difference(handle, tree, renamed, kept, known, going)
    if left:
        raise ToolError(f"libvirt does not keep what it is told: {left.sentences()[0]}", "see the log of libvirtd")
