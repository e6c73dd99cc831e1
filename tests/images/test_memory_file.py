"""A memory's file is known by what it holds; the same file must not have been written to either."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec.structs import replace

from snaptree.images.memory_file import ailment, identity_of
from snaptree.model.memory import Memory


def test_one_that_was_put_back_is_as_good_whatever_its_inodes_number(tmp_path: Path) -> None:
    path = tmp_path / "web1.memory"
    path.write_bytes(bytes(1000))
    looks = identity_of(str(path))
    memory = Memory(1, str(path), "background", 1000, looks)
    assert ailment(memory) == ""
    # As if it had been put back, and been given the number of the one that was taken away.
    another = replace(looks, generation=looks.generation + 1, mtime_ns=looks.mtime_ns - 5)
    assert ailment(replace(memory, identity=another)) == ""
    os.utime(path, ns=(0, looks.mtime_ns + 5))
    assert "was written to since" in ailment(memory)
