"""What is looked after already, or in use, is not looked after once more."""

from __future__ import annotations

import pytest
from tests.kit.scene import Scene
from tests.kit.space import held

EXISTS, BUSY = 4, 5


def test_without_a_command_the_machines_are_listed(web1: Scene) -> None:
    assert web1("").out == web1("list").out and "web1" in web1("").out
    assert "snaptree --help" in web1("").err
    web1("nonsense", status=2)


@pytest.mark.parametrize("plan", ["", " --plan"])
def test_a_disk_that_is_not_free_is_not_added(web1: Scene, plan: str) -> None:
    assert "belongs to machine 'web1'" in web1(f"add web2 --disk vda=web1.qcow2{plan}", status=EXISTS).err
    other = web1.image("other.qcow2")
    with held(other):
        assert "is open for writing" in web1(f"add web2 --disk vda=other.qcow2{plan}", status=BUSY).err
    assert web1("list --json").json[0]["machine"] == "web1" and len(web1("list --json").json) == 1
