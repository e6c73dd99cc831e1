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
    "test_a_machine_whose_image_is_open_is_left_alone": "of a domain libvirt says whether it runs",
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
NAME = "nothing is renamed while it runs: the name comes back when it is off (test_rows.py)"
PULL = "libvirt pulls into the tip only, and gives no name back while it runs (test_rows.py)"
BY_HAND = "its images are written to by hand, or are where libvirt's user may not go"
WHILE_RUNNING: dict[str, str] = {
    "test_a2_the_chain_is_as_short_as_before_and_nothing_is_lost[pull]": PULL,
    "test_a7_pull_gives_each_its_own_copy": NAME,
    "test_a8_the_middle_goes[pull]": PULL,
    "test_b5_a_mixed_subtree_goes": INTERNAL,
    "test_b6_an_external_one_that_has_an_internal_parent": INTERNAL,
    "test_b7_an_internal_one_below_an_overlay": INTERNAL,
    "test_b11_internal_and_external_in_one_snapshot": INTERNAL,
    "test_b14_and_removed_with_all_its_files": INTERNAL,
    "test_c2_going_back_below_an_external_one_leaves_it_right": INTERNAL,
    "test_c8_a_full_disk_leaves_all_disks_of_one_time": "in test_full_disk.py, with a libvirtd that sees the disk",
    "test_c9_progress_is_shown_and_cancelling_works": BY_HAND,
    "test_the_root_keeps_its_name_whatever_the_way[bbbbbbbb-.x-pull]": NAME,
    "test_the_root_keeps_its_name_whatever_the_way[b-.xxxxxxx-pull]": NAME,
    "test_the_cheaper_way_is_chosen": NAME,
    "test_an_internal_point_of_a_frozen_layer_grows_a_branch": INTERNAL,
    "test_an_internal_point_of_another_size_than_the_disk_has_now": INTERNAL,
    "test_internal_snapshots_are_made_external_where_a_merge_needs_it": INTERNAL,
    "test_descriptions_and_names_of_all_kinds": INTERNAL,
}
"""Scenarios, or those of some parameters, that are not those of a domain that runs, and why."""


@pytest.fixture(params=["off", "running"])
def scene(request: pytest.FixtureRequest, own: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """An empty folder for images; no domain yet."""
    name = request.node.originalname
    _, _, rest = request.node.callspec.id.partition("-")
    if request.param == "running" and (why := WHILE_RUNNING.get(name) or WHILE_RUNNING.get(f"{name}[{rest}]")):
        pytest.skip(why)
    # Some scenarios call snaptree's package by themselves.
    monkeypatch.setenv(URI, own.uri)
    with kept_folder() as folder:
        found = Domains(folder, own, request.param)
        try:
            yield found
        finally:
            found.remove()


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
    assert {*LEFT, *(each.partition("[")[0] for each in WHILE_RUNNING)} <= set(shared())
