"""What holds of standalone machines holds of domains: the same scenarios, with the domain off and while it runs.

The code is that of ``tests/scenarios``: pytest collects its tests here once more, with this folder's machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from tests.kit.domain import URI, kept_folder
from tests.kit.domains import Domains
from tests.kit.libvirtd import Libvirtd
from tests.kit.scene import Scene
from tests.scenarios import (
    test_a_what_snapshots_are_for,
    test_b_what_libvirt_refuses,
    test_block_devices,
    test_c_what_libvirt_gets_wrong,
    test_more_trees,
)

pytestmark = [pytest.mark.root, pytest.mark.slow]

SHARED: tuple[ModuleType, ...] = (
    test_a_what_snapshots_are_for,
    test_b_what_libvirt_refuses,
    test_c_what_libvirt_gets_wrong,
    test_more_trees,
    test_block_devices,
)
ADDED = "a domain is not added, and has no such settings"
LEFT = {
    "test_b8_after_a_merge_by_hand_only_what_it_touched_is_blocked": "of a domain the headers are the truth",
    "test_b14_a_machine_with_snapshots_is_forgotten": "libvirt's domains are there without being added",
    "test_c4_an_image_that_another_machine_stands_on_is_never_rewritten": "it names a domain, see test_reading",
    "test_c11_firmware_state_goes_with_snapshots_and_branches": ADDED,
    "test_c11_what_only_firmware_has_written_is_kept": ADDED,
    "test_c13_a_golden_image_under_two_machines_is_never_changed": "adding says so; of domains see test_reading",
    "test_two_snapshots_with_nothing_written_between_share_a_point": "virsh would merge into what two have together",
    "test_a_disk_detached_comes_back_with_a_snapshot_that_has_it": "a detached disk's tip is virsh's then",
    "test_a_chain_made_by_hand_is_adopted_with_its_siblings": ADDED,
    "test_internal_snapshots_that_are_found_become_part_of_the_tree": "of a domain libvirt's records say what is one",
    "test_metadata_goes_out_as_libvirts_xml_and_comes_back": "libvirt has it",
    "test_a_recorded_snapshot_without_its_data_is_refused": ADDED,
    "test_two_files_of_one_recorded_snapshot_are_refused": ADDED,
    "test_what_is_left_out_of_recorded_snapshots_is_said": ADDED,
    "test_a_pipe_among_the_xml_is_not_waited_for": ADDED,
    "test_a_relative_path_and_a_later_run_from_another_folder": ADDED,
    "test_set_remembers_and_plans_touch_nothing": ADDED,
}
"""Scenarios that are not a domain's, and why."""
INTERNAL = "internal snapshots are taken while it is off"
SIZE = "libvirt does not let the disk be resized under it so"
WHILE_RUNNING: dict[str, str] = {}
"""Scenarios that are not those of a domain that runs, and why."""


@pytest.fixture(params=["off", "running"])
def scene(request: pytest.FixtureRequest, own: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """An empty folder for images; no domain yet."""
    name = request.node.originalname
    if request.param == "running" and name in WHILE_RUNNING:
        pytest.skip(WHILE_RUNNING[name])
    # Some scenarios call snaptree's package by themselves.
    monkeypatch.setenv(URI, own.uri)
    with kept_folder() as folder:
        found = Domains(folder, own, request.param)
        try:
            yield found
        finally:
            found.remove()


device = test_block_devices.device


@pytest.fixture
def web1(scene: Scene) -> Scene:
    """The domain ``web1`` with one qcow2 disk that shows ``b.......``."""
    scene.image("web1.qcow2", word="b")
    scene("add web1 --disk vda=web1.qcow2")
    return scene


def shared() -> dict[str, Any]:
    """The scenarios, by name."""
    found: dict[str, Any] = {}
    for module in SHARED:
        here = {name: each for name, each in vars(module).items() if name.startswith("test_")}
        assert not set(here) & set(found), "two scenarios have one name"
        found |= here
    return found


globals().update({name: each for name, each in shared().items() if name not in LEFT})


def test_what_is_left_out_is_there() -> None:
    assert {*LEFT, *WHILE_RUNNING} <= set(shared())
