"""Another backing name, where the header has to be written anew as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.crash.cases import CASES
from tests.kit.world import World

from snaptree.images import durable


class PowerCut(BaseException):
    """Nothing is written any more."""


def test_a_torn_header_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is torn by a power cut, and part of the header is nothing: what it was to be is in the journal."""
    world, case = World(tmp_path), CASES["delete where names are long"]
    case.build(world)
    request, before = case.request(world), world.tree
    write = durable.write_in_place

    def torn(descriptor: int, offset: int, data: bytes, path: str) -> None:
        if offset:
            return write(descriptor, offset, data, path)  # The mover's.
        write(descriptor, offset, bytes(64) + data[64:], path)
        raise PowerCut

    with monkeypatch.context() as patched:
        patched.setattr(durable, "write_in_place", torn)
        with pytest.raises(PowerCut):
            world.machine.run(request)
    assert world.machine.recover()
    assert world.settle(request, before)
    world.check()
