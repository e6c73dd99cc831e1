"""snaptree's own mover: merges a row of layers by bringing clusters into one of them, or into a copy of it.

It takes qcow2 and raw; what it cannot do (``cost.foreseen`` says so beforehand) QEMU's jobs do. At every
moment the target shows what it showed, or is read only through the layers above it: see ``target`` for the order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct, field

from snaptree.errors import UnhealthyError
from snaptree.images import durable
from snaptree.images.mover.copying import Extent, Mover, Watch
from snaptree.images.mover.mapping import COPY, MIX, ZEROES, Mapping, Mask, Window, look_at_point, opened
from snaptree.images.mover.refcounts import Numbers
from snaptree.images.mover.seen import read_seen
from snaptree.images.mover.target import Target, open_target
from snaptree.images.tables import COPIED_BIT, Allocation

ROUND = 64 << 20
"""So much memory (bytes) the tables of a round may take: with the usual clusters they stand for 512 GiB of the disk."""
File = tuple[str, str]


class Merge(Struct, frozen=True):
    """One merge. ``row`` is lowest first, ``below`` what the lowest stands on, nearest first.

    ``into`` is the place in the row of the layer that takes the data, 0 or the last; with ``copy`` it is that file, a
    copy of that layer, which takes it instead. ``tag`` says that the first layer means an internal snapshot of it.
    """

    row: tuple[File, ...]
    below: tuple[File, ...]
    into: int
    copy: str | None = None
    share: bool = False
    tag: str | None = None


def merge(work: Merge, watch: Watch) -> int:
    """Carry out a merge; how many bytes were brought over, shared ones not counted.

    When it is stopped or fails, the target shows what it showed; what had been copied is leaked at worst.

    :raise CancelledError: the watch said so.
    :raise IoError: a file cannot be read or written.
    :raise NoSpaceError: there is no room.
    :raise UnhealthyError: a table is damaged, or an image is not as it was when it was planned.
    """
    path = work.copy or work.row[work.into][0]
    row_of_files = list(work.row)
    # A copy whose counts were mended has tables of its own.
    row_of_files[work.into] = (path, work.row[work.into][1])
    with opened([*reversed(work.below), *row_of_files]) as chain, durable.opened_for_writing(path) as descriptor:
        row = chain[len(work.below) :]
        if work.tag is not None:
            look_at_point(row[0], work.tag)
        below = chain[len(work.below) - 1].virtual_size if work.below else 0
        mapping = Mapping(row, work.into, below)

        def settle() -> None:
            # A copy has no name yet: a crash throws it away, and it is synced once, at its end.
            if work.copy is None:
                durable.sync(descriptor, path)

        target = open_target(descriptor, row[work.into], mapping.unit, settle)
        target.prepare(mapping.size)
        mover = Mover([each.descriptor for each in row], descriptor, path, watch, share=work.share)
        return _Merging(chain, mapping, target, mover).run()


class _Merging(Struct):
    chain: Sequence[Allocation]
    mapping: Mapping
    target: Target
    mover: Mover
    copied: int = field(default=0)

    def run(self) -> int:
        for window in self.mapping.windows():
            if window.packed:
                raise UnhealthyError(
                    f"{self.target.path}: compressed clusters have come since the merge was planned", "try again"
                )
            self._bring(window)
            if self.target.weight >= ROUND:
                self.target.finish_round()
                self.mover.finish()
        self.mover.watch.check()
        self.target.finish(self.mapping.size)
        self.mover.finish()
        return self.copied

    def _bring(self, window: Window) -> None:
        """Bring over what one window of addresses needs."""
        first = window.start // self.target.unit
        numbers = np.arange(first, first + len(window.kinds), dtype=np.uint64)
        entries = window.entries if len(window.entries) else np.zeros(len(numbers), dtype=np.uint64)
        given = (window.kinds == COPY) | (window.kinds == MIX)
        in_place = given & self.target.writable(np.where(given, entries, np.uint64(0)))
        wanted = window.kinds == COPY
        places = np.zeros(len(numbers), dtype=np.uint64)
        places[in_place] = self.target.held(numbers[in_place], entries[in_place])
        # In the order in which they lie in their files: what the guest wrote at random was written there in a row.
        order = np.lexsort((window.places, window.layers))
        new = order[(wanted & ~in_place)[order]]
        old = order[(wanted & in_place)[order]]
        places[new] = self.target.take(len(new))
        for chosen, fresh in ((old, False), (new, True)):
            if len(chosen):
                self.mover.move(self._extents(window, chosen, places), fresh=fresh)
        if not self.mover.share:
            self.copied += int(np.count_nonzero(wanted)) * self.target.unit
        self._mix(window, in_place, places)
        self.target.clear(numbers[window.kinds == ZEROES])
        # An entry that says so already stays; one that says zeroes of a cluster that is there does not.
        changed = given & ~(in_place & (entries == (places | COPIED_BIT)))
        self.target.refer(numbers[changed], places[changed])

    def _extents(self, window: Window, chosen: Numbers, places: Numbers) -> list[Extent]:
        unit = self.target.unit
        layers, source, goal = window.layers[chosen], window.places[chosen], places[chosen]
        step = np.uint64(unit)
        breaks = (layers[1:] != layers[:-1]) | (source[1:] != source[:-1] + step) | (goal[1:] != goal[:-1] + step)
        firsts = np.flatnonzero(np.concatenate([[True], breaks]))
        lengths = np.diff(np.concatenate([firsts, [len(chosen)]])) * unit
        columns = (layers[firsts].tolist(), source[firsts].tolist(), goal[firsts].tolist(), lengths.tolist())
        return list(zip(*columns, strict=True))

    def _mix(self, window: Window, in_place: Mask, places: Numbers) -> None:
        """Put together, from what shows, the clusters that come from several places."""
        unit = self.target.unit
        for number in np.flatnonzero(window.kinds == MIX).tolist():
            self.mover.watch.check()
            start = window.start + number * unit
            data = read_seen(self.chain, start, unit)
            if not in_place[number]:
                places[number] = self.target.take(1)[0]
            # A raw file is not made longer than the disk.
            data = data[: min(unit, self.mapping.size - start)] if self.target.trims else data
            durable.write_in_place(self.mover.target, int(places[number]), data, self.target.path)
            self.copied += unit
            self.mover.watch.moved(unit)
