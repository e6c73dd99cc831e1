"""Reading what a guest sees through a chain of layers, a little at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence

from snaptree.errors import UnhealthyError
from snaptree.images.tables import COMPRESSED, DATA, UNALLOCATED, Allocation


def read_seen(chain: Sequence[Allocation], start: int, length: int) -> bytes:
    """What the highest layer of the chain, lowest first, shows from ``start`` on (bytes); zeroes past its end.

    :raise UnhealthyError: a compressed cluster lies there, or a table is damaged.
    """
    found = bytearray(length)
    _fill(chain, len(chain) - 1, start, start + length, found, start)
    return bytes(found)


def _fill(chain: Sequence[Allocation], level: int, start: int, end: int, found: bytearray, origin: int) -> None:
    if level < 0:
        return
    layer = chain[level]
    end = min(end, layer.virtual_size)
    unit = layer.cluster
    at = start
    while at < end:
        begin = at // unit * unit
        stop = min(begin + unit, end)
        (kind,), (place,) = layer.places(begin, begin + unit, unit)
        if kind == DATA:
            data = os.pread(layer.descriptor, stop - at, int(place) + at - begin)
            found[at - origin : at - origin + len(data)] = data
        elif kind == UNALLOCATED:
            _fill(chain, level - 1, at, stop, found, origin)
        elif kind == COMPRESSED:
            raise UnhealthyError(f"{layer.path} has compressed clusters where none were foretold", "is it in use?")
        at = stop
