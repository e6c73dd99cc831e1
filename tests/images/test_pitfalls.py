"""Every pitfall of qcow2 and QEMU that is known has a test: the table says which, and these are about opening images.

Those about merging stand in ``test_pitfalls_merging.py``.
"""

from __future__ import annotations

import ast
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.kit import images
from tests.kit.images import KiB
from tests.kit.scene import SLOT, SLOTS, Scene

SEE_TO = 13
ROOT = Path(__file__).parents[2]
HERE, MERGING = "images/test_pitfalls.py", "images/test_pitfalls_merging.py"

ROWS: dict[str, tuple[str, ...]] = {
    "format probing": (
        f"{HERE}::test_a_header_that_a_guest_wrote_is_data",
        "cli/test_bad_input.py::test_a_raw_disk_is_never_probed",
        "images/test_header.py::test_a_raw_image_is_never_looked_into",
    ),
    "a backing file that is a host file": (
        "images/test_gate.py::test_a_backing_file_elsewhere_has_to_be_allowed",
        "cli/test_bad_input.py::test_images_that_are_not_what_they_should_be",
    ),
    "json: and protocol names in backing strings": (
        f"{HERE}::test_a_protocol_in_a_header_that_was_changed_later",
        "images/test_gate.py::test_refuses_names_that_are_no_plain_files",
        "images/test_gate.py::test_graphs_open_in_qemu_and_override_headers",
    ),
    "external data file": (
        f"{HERE}::test_an_external_data_file_is_not_opened",
        "images/test_gate.py::test_what_is_missing_or_damaged",
    ),
    "hostile headers": (
        "images/test_header.py::test_refuses_hostile_headers",
        "images/test_header.py::test_many_snapshots_with_huge_tables_cost_little",
        "images/test_hostile.py::test_hostile_images_are_harmless",
    ),
    "missing backing format": (
        f"{HERE}::test_every_header_says_the_format_of_its_backing_file",
        "images/test_gate.py::test_a_missing_format_is_found_or_asked_for",
    ),
    "relative backing names": (
        f"{HERE}::test_every_header_says_the_format_of_its_backing_file",
        "images/test_gate.py::test_a_link_beside_another_backing_file",
        "cli/test_bad_input.py::test_symlinks",
    ),
    "a file name with a colon": (
        "images/test_gate.py::test_a_colon_in_a_name_opens_in_qemu",
        "cli/test_bad_input.py::test_file_names_of_all_kinds",
    ),
    "qemu-img create over an existing file or symlink": (
        "images/test_durable.py::test_a_new_file_never_replaces_one",
        "images/test_links.py::test_nothing_is_written_through_a_link_at_the_place_of_a_new_file",
        "images/test_privacy.py::test_new_files_have_the_rights_of_the_layer_below",
    ),
    "a loop of backing files": (
        "images/test_gate.py::test_refuses_loops_before_qemu_hangs_in_them",
        "cli/test_bad_input.py::test_a_longer_loop_of_backing_files",
    ),
    "committing into a base that a sibling stands on": (
        f"{MERGING}::test_what_a_sibling_stands_on_is_not_written",
        "scenarios/test_c_what_libvirt_gets_wrong.py::test_c4_an_image_that_another_machine_stands_on_is_never_rewritten",
    ),
    "QEMU's locks cover only open images": (
        f"{HERE}::test_locks_are_never_passed_over",
        "cli/test_bad_input.py::test_two_operations_exclude_each_other_across_state_folders",
        "cli/test_bad_input.py::test_an_image_that_another_process_has_open",
        "crash/test_many_at_once.py::test_qemu_cannot_open_a_tip_while_it_is_merged",
    ),
    "dirty bit": (
        f"{HERE}::test_a_tip_that_was_not_closed_is_whole",
        "images/test_gate.py::test_the_dirty_bit_is_normal_in_a_tip_only",
    ),
    "corrupt bit": (
        f"{HERE}::test_nothing_is_built_on_a_corrupt_layer",
        "images/test_gate.py::test_what_is_missing_or_damaged",
    ),
    "overlay larger than base": (
        f"{MERGING}::test_a_merged_layer_is_as_long_as_the_upper_one",
        f"{MERGING}::test_a_disk_that_the_lower_file_cannot_hold_is_merged_into_the_upper_one",
        "cli/test_bad_input.py::test_a_merge_that_would_not_fit_is_refused_with_the_figures",
    ),
    "overlay smaller than base": (
        f"{MERGING}::test_a_merged_layer_is_as_long_as_the_upper_one",
        f"{MERGING}::test_a_base_is_not_cut_while_something_else_stands_on_it",
    ),
    "short layer in the middle": (f"{MERGING}::test_what_a_short_layer_hides_stays_hidden",),
    "internal snapshots in a layer": (f"{MERGING}::test_internal_snapshots_show_the_same_after_a_merge",),
    "commit over several layers": (f"{MERGING}::test_layers_between_go_with_the_merge",),
    "persistent bitmaps": (f"{MERGING}::test_bitmaps_are_reported_and_never_dropped",),
    "compressed clusters": (f"{MERGING}::test_compressed_clusters_are_counted_as_they_will_be",),
    "zero clusters": (f"{MERGING}::test_zero_clusters_hide_what_is_below",),
    "extended L2, other cluster sizes": (f"{MERGING}::test_overlays_have_the_options_of_their_base",),
    "LUKS": (
        "scenarios/test_encrypted.py::test_overlays_need_no_key",
        "scenarios/test_encrypted.py::test_layers_are_merged",
        "scenarios/test_encrypted.py::test_nothing_goes_down_into_a_plain_layer",
        "running/test_encrypted.py::test_layers_are_merged_while_it_runs",
        "images/test_aes.py::test_an_image_that_was_encrypted_later_gets_no_plain_overlay",
    ),
    "an interrupted commit": (
        "scenarios/test_b_what_libvirt_refuses.py::test_b9_an_interrupted_delete_is_resumed",
        "scenarios/test_found_by_attack.py::test_a_guest_that_wrote_between_a_kill_and_its_recovery_loses_nothing",
        "crash/test_matrix.py::test_killed_at_calls_of_every_operation",
    ),
    "progress counts virtual size": (
        "scenarios/test_c_what_libvirt_gets_wrong.py::test_c9_progress_is_shown_and_cancelling_works",
        f"{MERGING}::test_progress_counts_the_bytes_that_move",
    ),
    "block nodes with generated names": ("running/test_live_drive.py::test_blocks_are_shared_and_options_kept",),
    "QEMU may be gone at any message": (f"{MERGING}::test_a_merge_ends_when_qemu_is_gone",),
}
"""The pitfalls, and what holds each."""


def names_in(path: Path) -> set[str]:
    """The names of the tests in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {each.name for each in tree.body if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")}


def test_the_table_names_tests_that_are_there() -> None:
    named = {name for tests in ROWS.values() for name in tests}
    there: dict[str, set[str]] = {}
    for name in named:
        file, _, test = name.partition("::")
        there.setdefault(file, names_in(ROOT / "tests" / file))
        assert test in there[file], f"there is no {name}"
    mine = {f"{file}::{test}" for file in (HERE, MERGING) for test in there[file]}
    assert mine - named == {f"{HERE}::test_the_table_names_tests_that_are_there"}, "and the table names all of these"


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def backing(path: Path | str, image_format: str = "qcow2") -> tuple[str, str] | None:
    """What the image's header names as its backing file, and that file's format."""
    said = images.info(path, image_format)
    return (said["backing-filename"], said["backing-filename-format"]) if "backing-filename" in said else None


def test_a_header_that_a_guest_wrote_is_data(scene: Scene) -> None:
    """Format probing: a raw disk on which the guest wrote a qcow2 header is raw to every verb."""
    secret = scene.folder / "secret"
    secret.write_bytes(b"secret" * 1000)
    trap = images.create(scene.folder / "trap.qcow2", 64 * KiB, backing=(secret, "raw"))
    path = scene.image("web1.img", "raw", word="..r")
    patch(path, 0, trap.read_bytes()[: 2 * SLOT])
    wanted = path.read_bytes()[: 2 * SLOT].ljust(2 * SLOT, b"\0")
    scene("add web1 --disk vda=web1.img,format=raw")

    scene("snapshot web1 s1")
    scene.write("...x")
    assert backing(scene.path("main")) == ("web1.img", "raw")
    scene("branch web1 b1 --from s1")
    scene("snapshot web1 s2")
    for name in ("main", "b1", "s1"):
        point = scene.path(name)
        assert images.read(point, scene.format_of(point))[: 2 * SLOT] == wanted
    scene("verify web1")
    scene("delete web1 --branch b1")
    scene("delete web1 s1 s2 --merge commit")

    assert scene.files() == {"web1.img"}
    content = path.read_bytes()
    assert content[: 2 * SLOT] == wanted and content[2 * SLOT :: SLOT][:2] == b"rx"


@pytest.mark.parametrize("name", ["json:{}", "nbd:h:1", "file:x"])
def test_a_protocol_in_a_header_that_was_changed_later(web1: Scene, name: str) -> None:
    """json: and protocol names in backing strings: nothing opens a header's name that the tree does not know."""
    web1("snapshot web1 s1")
    web1.write(".x")
    path = web1.path("main")
    good = path.read_bytes()[:512]
    at, size = struct.unpack(">QI", good[8:20])
    patch(path, at, name.encode().ljust(size, b"\0"))
    patch(path, 16, struct.pack(">I", len(name)))

    for line in ("snapshot web1 s2", "branch web1 b1", "delete web1 s1 --merge none", "gc web1"):
        status = 0 if line.startswith(("delete", "gc")) else 7
        said = web1(line, status=status)
        assert status == 0 or name in said.err
    assert name in web1("verify web1", status=10).out
    patch(path, 0, good)

    assert web1.shows() == "bx......"


def test_an_external_data_file_is_not_opened(web1: Scene) -> None:
    """External data file: refused from the header, whether the image is new or has become one."""
    data = web1.disks / "data.raw"
    path = images.create(web1.disks / "web2.qcow2", SLOTS * SLOT, data_file=data)
    data.unlink()
    os.mkfifo(data)  # Who opens it waits for ever.
    for line in ("add web2 --disk vda=web2.qcow2", "disk attach web1 vdb=web2.qcow2"):
        assert "in another file" in web1(line, status=6).err
    web1.image("top.qcow2")
    images.run("qemu-img", "rebase", "-u", "-b", "web2.qcow2", "-F", "qcow2", web1.disks / "top.qcow2")
    assert "in another file" in web1("add web2 --disk vda=top.qcow2", status=6).err

    os.replace(path, web1.disks / "web1.qcow2")
    assert "in another file" in web1("snapshot web1 s1", status=7).err
    assert "in another file" in web1("verify web1", status=10).out
    assert data.is_fifo()


def test_every_header_says_the_format_of_its_backing_file(scene: Scene) -> None:
    """Missing backing format, relative backing names: every header that snaptree writes has the format and the way."""
    (scene.disks / "far").mkdir()
    scene.image("golden.img", "raw", word="gold")
    scene.image("web1.qcow2", backing="golden.img:raw", word="....r")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 i1 --internal")
    scene.write(".....x")
    for number, file in enumerate(("", "--file vda=far/two.qcow2", "")):
        scene(f"snapshot web1 s{number} {file}")
        scene.write("......" + "xyz"[number])
    scene("branch web1 inner --from i1")
    scene("branch web1 outer --from s1 --file vda=far/outer.qcow2")

    def named() -> dict[str, Any]:
        layers = scene.show()["layers"]
        return {os.path.basename(each["path"]): backing(each["path"], each["format"]) for each in layers}

    assert named() == {
        "golden.img": None,
        "web1.qcow2": ("golden.img", "raw"),
        "web1.s0.qcow2": ("web1.qcow2", "qcow2"),
        "two.qcow2": ("../web1.s0.qcow2", "qcow2"),
        "web1.s2.qcow2": ("far/two.qcow2", "qcow2"),
        "outer.qcow2": ("../web1.s0.qcow2", "qcow2"),
        "web1.inner.qcow2": ("golden.img", "raw"),
    }
    scene("delete web1 s0 s2 --merge pull")
    scene("delete web1 s1 --merge commit")
    scene("delete web1 i1")
    assert all(form in ("raw", "qcow2") and not name.startswith("/") for name, form in filter(None, named().values()))
    assert scene.shows() == "goldrxz." and scene.shows("inner") == "goldr..."


def test_locks_are_never_passed_over() -> None:
    """QEMU's locks cover only open images: no image is opened with ``-U``, which would pass over them."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in ("-U", "--force-share", "force-share"), f"{path}:{node.lineno}"


def killed_while_writing(path: Path, *commands: str) -> None:
    """QEMU writes to the image and is killed with the image open."""
    words = [each for command in (*commands, "flush", "sigraise 9") for each in ("-c", command)]
    images.run("qemu-io", "-f", "qcow2", *words, path, good=(-9,))


@pytest.mark.parametrize("way", ["commit", "pull"])
def test_a_tip_that_was_not_closed_is_whole(scene: Scene, way: str) -> None:
    """Dirty bit: where reference counts are late all is whole, is said to be so, and goes on."""
    scene.image("web1.qcow2", word="b", lazy_refcounts="on")
    scene("add web1 --disk vda=web1.qcow2")
    killed_while_writing(scene.path("main"), f"write -P {ord('c')} {SLOT} {SLOT}")
    assert images.info(scene.path("main"))["dirty-flag"] and images.problems(scene.path("main"))

    assert "was not closed cleanly" in scene("verify web1", status=SEE_TO).out
    scene("snapshot web1 s1")
    killed_while_writing(scene.path("main"), f"write -P {ord('d')} {2 * SLOT} {SLOT}")
    scene("verify web1", status=SEE_TO)
    scene("branch web1 b1 --from s1")
    assert (scene.shows("s1"), scene.shows("b1"), scene.shows()) == ("bc......", "bc......", "bcd.....")
    scene("delete web1 --branch b1")
    scene(f"delete web1 s1 --merge {way}")

    assert scene.shows() == "bcd....."
    scene.sound()


def test_nothing_is_built_on_a_corrupt_layer(web1: Scene) -> None:
    """Corrupt bit: a layer that QEMU has marked since is read as such before anything stands on it."""
    web1("snapshot web1 s1")
    web1.write(".x")
    web1("snapshot web1 s2")
    web1.write("..y")
    middle = web1.path("s2")
    stamp = middle.stat()
    patch(middle, 72, struct.pack(">Q", 2))
    os.utime(middle, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    before = web1.files()

    for line in ("snapshot web1 s3", "branch web1 b1 --from s2", "revert web1 s2"):
        assert "marked as corrupt" in web1(line, status=7).err
    assert "stays as it is" in web1("delete web1 s2").out
    assert "marked as corrupt" in web1("verify web1", status=10).out
    assert web1.files() == before
    web1("branch web1 whole --from s1")
    assert web1.shows("whole") == "b......."
