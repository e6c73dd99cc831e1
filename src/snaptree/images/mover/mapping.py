"""What a merge has to bring into the file that takes the data: per cluster nothing, a copy, zeroes, or a mix.

The same answer serves the estimate and the mover, so that what is foretold is what moves. It is given in windows: the
tables of a large image are never held whole.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from snaptree.errors import NotFoundError
from snaptree.images.facts import open_to_read
from snaptree.images.header import read_internals
from snaptree.images.tables import (
    COMPRESSED,
    DATA,
    UNALLOCATED,
    ZERO,
    Allocation,
    Classes,
    Places,
    Qcow2Allocation,
    open_allocation,
)

WINDOW_GRANULES = 1 << 18
"""So many units of allocation are looked at together: a few mebibytes for each layer."""
NOTHING, COPY, ZEROES, MIX = 0, 1, 2, 3
"""What a cluster gets: ``COPY`` is one whole cluster's worth from one place, ``MIX`` is put together from several."""
_MIXED = np.uint8(COMPRESSED + 1)
_GETS = np.array([NOTHING, COPY, ZEROES, MIX, MIX], dtype=np.uint8)
"""What a cluster gets that is one granule, by what that is: in the order of the classes, and ``_MIXED``."""
Mask = npt.NDArray[np.bool_]


@contextlib.contextmanager
def opened(layers: Sequence[tuple[str, str]]) -> Iterator[list[Allocation]]:
    """The allocation of each layer, ``(path, format)``, in their order, while the block lasts."""
    with contextlib.ExitStack() as stack:
        row: list[Allocation] = []
        for path, image_format in layers:
            descriptor = open_to_read(path)
            stack.callback(os.close, descriptor)
            row.append(open_allocation(descriptor, path, image_format))
        yield row


def look_at_point(image: Allocation, tag: str) -> None:
    """Let an allocation be that of an internal snapshot, at the size that the disk had then.

    Of several with that name it is the first, as to QEMU.

    :raise NotFoundError: there is none.
    """
    assert isinstance(image, Qcow2Allocation)
    for entry in read_internals(image.descriptor, image.header, image.path):
        if entry.facts.name == tag:
            image.use_l1(entry.l1_table_offset, entry.l1_size)
            image.virtual_size = entry.facts.virtual_size
            return
    raise NotFoundError(f"{image.path} has no internal snapshot {tag!r}", "see 'snaptree verify'")


class Window(Struct, frozen=True):
    """A part of the guest's address range, in clusters of the target from ``start`` (bytes) on.

    For each cluster: ``kinds`` what it gets; for a copy ``layers`` which of the row it comes from and ``places`` where
    in that file it lies (bytes); ``there`` what the target has now, and ``entries`` the target's own L2 entries (none
    for a raw target). ``beneath`` says which mixed clusters show something of what the row stands on, ``packed``
    whether compressed clusters are among what moves or what is overwritten: the mover leaves those to QEMU.
    """

    start: int
    kinds: Classes
    layers: Classes
    places: Places
    there: Classes
    entries: Places
    beneath: Mask
    packed: bool


class Mapping:
    """The clusters that move when a row is merged, lowest layer first.

    :param row: the layers' allocations. The result is as long as the last one.
    :param into: the place in the row of the one that takes the data: 0, or the last.
    :param below: the virtual size of what the lowest layer stands on; 0 when it stands on nothing.
    :raise UnhealthyError: a table is damaged.
    """

    def __init__(self, row: Sequence[Allocation], into: int, below: int) -> None:
        self.row = row
        self.into = into
        self.target = row[into]
        self.below = below
        self.size = row[-1].virtual_size
        # A raw file has no units of its own; holes in it are told in those of the others.
        self.granule = min(each.granule for each in row if isinstance(each, Qcow2Allocation))
        self.unit = self.target.cluster if isinstance(self.target, Qcow2Allocation) else self.granule
        self._largest = max(self.unit, *(each.cluster for each in row))
        self._span = max(WINDOW_GRANULES * self.granule // self._largest, 1) * self._largest
        self._tails = sorted({each.virtual_size for each in row if each.virtual_size % self.granule})
        # Past the end of a layer of the row all reads as zeroes; that matters where something would show there.
        shortest = min(each.virtual_size for each in row)
        deepest = max(below, self.target.virtual_size if into == 0 else 0)
        self._hidden = range(shortest, min(self.size, deepest))

    def windows(self) -> Iterator[Window]:
        """The windows in which something may have to be done, in the order of addresses."""
        sources = [each for place, each in enumerate(self.row) if place != self.into]
        busy = set().union(*(each.busy(self._span) for each in sources))
        if self._hidden:
            busy.update(range(self._hidden.start // self._span, -(-self._hidden.stop // self._span)))
        if self.into == 0 and self.size > self.target.virtual_size:
            # What lies past its end shows when it grows: the memory of a machine, or what a stopped merge has left.
            last = self.target.virtual_size // self._span
            busy.update({last} | {each for each in self.target.busy(self._span) if each > last})
        for number in sorted(busy):
            start = number * self._span
            end = min(start + self._span, -(-self.size // self._largest) * self._largest)
            if start < end:
                window = self._window(start, end)
                if np.any(window.kinds != NOTHING):
                    yield window

    def _window(self, start: int, end: int) -> Window:
        there = self.target.places(start, end, self.granule)[0]
        kinds, layers, places = self._topmost(start, end)
        beneath = self._first(self.below, start, len(kinds))
        if self.into == 0:
            target = self.target.virtual_size
            past = ~self._first(target, start, len(kinds))
            kinds[(kinds == UNALLOCATED) & past & (beneath | (there != UNALLOCATED))] = ZERO
        self._mark_tails(start, end, kinds, there, beneath)
        if self.into != 0:
            kinds[there != UNALLOCATED] = UNALLOCATED
        # Zeroes need no writing where zeroes show already.
        shown = there if self.into == 0 else np.zeros_like(there)
        needless = (kinds == ZERO) & ((shown == ZERO) | ((shown == UNALLOCATED) & ~beneath))
        kinds[needless] = UNALLOCATED
        if isinstance(self.target, Qcow2Allocation) and self.target.header.version < 3:
            # Version 2 has no zero clusters: they are written out.
            kinds[kinds == ZERO] = _MIXED
        inside = -(-self.size // self.granule) - start // self.granule
        kinds[max(0, inside) :] = UNALLOCATED
        return self._grouped(start, kinds, layers, places, there, beneath)

    def _mark_tails(self, start: int, end: int, kinds: Classes, there: Classes, beneath: Mask) -> None:
        """Where a layer ends within a granule, what lies past its end there is zeroes, whatever the file holds."""
        for tail in self._tails:
            if not start <= tail < end:
                continue
            place = (tail - start) // self.granule
            grown = tail < self.size and (beneath[place] or (self.into == 0 and there[place] == DATA))
            if kinds[place] == DATA or (kinds[place] == UNALLOCATED and grown):
                kinds[place] = _MIXED

    def _seen(self, layer: Allocation, start: int, end: int) -> tuple[Classes, Places]:
        """What the layer has; past its end it hides what is beneath with zeroes."""
        found, places = layer.places(start, end, self.granule)
        ends = -(-layer.virtual_size // self.granule) - start // self.granule
        if ends < len(found):
            found = found.copy()
            found[max(0, ends) :] = ZERO
        return found, places

    def _topmost(self, start: int, end: int) -> tuple[Classes, Classes, Places]:
        """What shows through all layers but the target, from the highest down, and of which layer it is."""
        order = [place for place in range(len(self.row) - 1, -1, -1) if place != self.into]
        kinds, places = self._seen(self.row[order[0]], start, end)
        kinds, places = kinds.copy(), places.copy()
        layers = np.full(len(kinds), order[0], dtype=np.uint8)
        for place in order[1:]:
            through = np.flatnonzero(kinds == UNALLOCATED)
            if not len(through):
                break
            below, where = self._seen(self.row[place], start, end)
            kinds[through] = below[through]
            places[through] = where[through]
            layers[through] = place
        return kinds, layers, places

    def _first(self, size: int, start: int, count: int) -> Mask:
        """Which granules begin before that size."""
        found = np.zeros(count, dtype=bool)
        found[: max(0, -(-size // self.granule) - start // self.granule)] = True
        return found

    def _grouped(
        self, start: int, kinds: Classes, layers: Classes, places: Places, there: Classes, beneath: Mask
    ) -> Window:
        """From granules to the target's clusters."""
        parts = self.unit // self.granule
        count = len(kinds) // parts
        wide = kinds.reshape(count, parts)
        first = places.reshape(count, parts)[:, 0]
        if parts == 1:
            found = _GETS[kinds]
            shown = (found == MIX) & beneath
            layer = layers
        else:
            layer = layers.reshape(count, parts)[:, 0]
            steps = np.arange(parts, dtype=np.uint64) * np.uint64(self.granule)
            whole = np.all(wide == DATA, axis=1)
            whole &= np.all(layers.reshape(count, parts) == layer[:, None], axis=1)
            whole &= np.all(places.reshape(count, parts) == first[:, None] + steps, axis=1)
            whole &= first % np.uint64(self.granule) == 0
            empty, zero = np.all(wide == UNALLOCATED, axis=1), np.all(wide == ZERO, axis=1)
            found = np.select([empty, whole, zero], [NOTHING, COPY, ZEROES], default=MIX).astype(np.uint8)
            shown = (found == MIX) & np.any(((wide == UNALLOCATED) & beneath.reshape(count, parts)), axis=1)
        entries = np.zeros(0, dtype=np.uint64)
        has = there.reshape(count, parts)[:, 0]
        if isinstance(self.target, Qcow2Allocation):
            cluster = start // self.unit
            entries = self.target.entries(cluster, cluster + count)
            has = self.target.classes_of(entries)
        packed = bool(np.any(kinds == COMPRESSED) or np.any(has[found != NOTHING] == COMPRESSED))
        return Window(start, found, layer, first, has, entries, shown, packed)
