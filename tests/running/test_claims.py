"""What snaptree has made is known by its inode as long as it is there, and forgotten with it."""

from __future__ import annotations

import os

from tests.kit.scene import Scene

from snaptree.machines.connection import Connection
from snaptree.store.codec import load


def claimed(scene: Scene) -> set[str]:
    rows = Connection(str(scene.state)).database.rows("SELECT path FROM claim")
    return {os.path.basename(load(str(row[0]))) for row in rows}


def test_what_is_removed_is_forgotten(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write("x")
    web1("branch web1 other --from s1")
    made = web1.files() - {"web1.qcow2"}
    assert len(made) == 2 and claimed(web1) == made
    web1("delete web1 --branch other")
    web1("delete web1 s1 --merge commit")
    assert web1.files() == {"web1.qcow2"} and claimed(web1) == set()
