"""Merges by shared blocks under machines of every kind: options are kept, or it is done in another way, with a word."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from tests.kit import guest, images
from tests.kit.guest import Guest
from tests.kit.records import DISK_BYTES
from tests.kit.stage import Stage, processes_of
from tests.live.test_delete import kept, snapshots

BUSY = 5
JSON = {
    "driver": "qcow2",
    "node-name": "n-vda",
    "l2-cache-size": 262144,
    "lazy-refcounts": True,
    "discard": "unmap",
    "detect-zeroes": "unmap",
    "cache": {"direct": True},
    "file": {"driver": "file", "locking": "on", "aio": "native", "cache": {"direct": True}},
}
WORDS = (
    "-object iothread,id=io -object throttle-group,id=tg "
    "-blockdev file,node-name=f-vdb,filename={path},locking=on,cache.direct=on "
    "-blockdev qcow2,node-name=n-vdb,file=f-vdb,l2-cache-size=262144,lazy-refcounts=on,cache.direct=on "
    "-blockdev throttle,node-name=t-vdb,throttle-group=tg,file=n-vdb"
)


def with_options(stage: Stage) -> Guest:
    """QEMU as a user starts it who cares for options, on the tips as they are."""
    paths = {disk: str(stage.path("main", disk)) for disk in guest.DISKS}
    disk = {**JSON, "file": {**JSON["file"], "filename": paths["vda"]}}  # type: ignore[dict-item]
    words = [*stage.boot.words(stage.folder), "-blockdev", json.dumps(disk)]
    words += [*WORDS.format(path=paths["vdb"]).split(), "-device", guest.device("vda", "n-vda")]
    words += ["-device", f"{guest.device('vdb', 't-vdb')},iothread=io"]
    return guest.launch([*words, "-qmp", f"unix:{stage.folder}/qmp,server=on,wait=off"], stage.folder)


def looks(stage: Stage, disk: str) -> dict[str, object]:
    """How QEMU has the tip open: what it says, and what is seen of it."""
    path = str(stage.path("main", disk))
    with stage.qmp() as qmp:
        nodes = qmp("query-named-block-nodes", flat=True)
    (file,) = (each for each in nodes if each["drv"] == "file" and each["file"] == path)
    (image,) = (each for each in nodes if each["drv"] == "qcow2" and path in each["image"]["filename"])
    (process,) = processes_of(stage.folder)
    flags = set()
    for descriptor in os.listdir(f"/proc/{process}/fd"):
        # Others come and go meanwhile, such as the monitor's.
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/{process}/fd/{descriptor}") == path:
                text = Path(f"/proc/{process}/fdinfo/{descriptor}").read_text()
                flags.add(bool(int(text.split("flags:")[1].split()[0], 8) & os.O_DIRECT))
    return {
        "file": file["cache"],
        "image": image["cache"],
        "zeroes": image["detect_zeroes"],
        "direct": flags,
        "lazy": bool(Path(path).read_bytes()[79] & 1),
    }


def test_options_of_a_machine_that_somebody_started_are_kept(sharing: Stage) -> None:
    stage = sharing
    stage.add(raw=False)
    for name in ("s1", "s2"):
        stage(f"snapshot web1 {name}")
        for disk in guest.DISKS:
            # Nothing written, and two snapshots would share a point.
            words = ["qemu-io", "-f", "qcow2", "-c", "write -P 0 0 64k", str(stage.path("main", disk))]
            subprocess.run(words, check=True, capture_output=True)
    stage.monitor = stage.folder / "qmp"
    stage.guest = with_options(stage)
    stage(f"set web1 --qmp {stage.monitor}")
    stage.guest.go()
    stage.guest.writes_on(60)
    before = {disk: looks(stage, disk) for disk in guest.DISKS}
    assert before["vda"]["lazy"] and before["vdb"]["lazy"] and before["vda"]["direct"] == {True}
    for name in ("s2", "s1"):
        path = {disk: stage.path("main", disk) for disk in guest.DISKS}
        plan = stage(f"delete web1 {name} --merge reflink --plan --json").json
        assert "reflink" in (plan["way"] or ""), plan["notes"]
        stage(f"delete web1 {name} --merge reflink")
        stage.guest.writes_on(60)
        assert {disk: stage.path("main", disk) for disk in guest.DISKS} == path
        assert {disk: looks(stage, disk) for disk in guest.DISKS} == before
    with stage.qmp() as qmp:
        sizes = [each for each in qmp("query-named-block-nodes", flat=True) if each["drv"] == "qcow2"]
    assert len(sizes) == 2
    stage.finish()


def test_ways_differ_among_the_disks(sharing: Stage) -> None:
    """A raw root stays raw, so that its disk goes another way than the other."""
    stage = sharing
    guest_ = stage.start()
    wanted = snapshots(stage, 3)
    plan = stage("delete web1 s1 --plan --json").json
    assert plan["way"] == "commit+reflink", plan
    stage("delete web1 s1")
    guest_.writes_on()
    assert stage.holds("s2") == wanted["s2"] and stage.holds("s3") == wanted["s3"]
    plan = stage("delete web1 s2 --plan --json").json
    stage("delete web1 s2")
    guest_.writes_on()
    assert stage.holds("s3") == wanted["s3"]
    stage.finish()
    assert {Path(each["path"]).name for each in stage.show()["layers"]} >= {"vda.qcow2", "vdb.raw"}


def test_a_fork_point_gets_a_copy_for_each(sharing: Stage) -> None:
    stage = sharing
    stage.add("--start", stage.boot.command(stage.folder), raw=False)
    stage("start web1")
    stage.guest.go()
    before = snapshots(stage, 2)
    stage("stop web1")
    stage("branch web1 other --from s1")
    stage("snapshot web1 s3")
    before = {name: stage.holds(name) for name in ("s2", "s3", "other")}
    stage("start web1")
    last = min(before["s3"])
    stage.guest.go(at=last)
    plan = stage("delete web1 s1 --merge reflink --plan --json").json
    assert plan["way"] == "reflink" and plan["bytes_to_copy"] < 1 << 20, plan
    said = stage("delete web1 s1 --merge reflink --json").json
    stage.guest.writes_on()
    for name in ("s2", "s3", "other"):
        assert stage.holds(name) == before[name], name
    assert "shared" not in {each["role"] for each in stage.show()["layers"]}, said
    stage.sound()
    stage.finish()
    for name in ("s2", "s3", "other"):
        assert stage.holds(name) == before[name], name


@pytest.mark.parametrize("way", ["reflink", "pull"])
def test_both_disks_stand_on_one_base(sharing: Stage, way: str) -> None:
    stage = sharing
    images.create(stage.disks / "golden.qcow2", DISK_BYTES)
    for disk in guest.DISKS:
        images.create(stage.disks / f"{disk}.qcow2", DISK_BYTES, backing=(stage.disks / "golden.qcow2", "qcow2"))
    start = stage.boot.command(stage.folder)
    stage(shlex.join(["add", "web1", "--disk", "vda=vda.qcow2", "--disk", "vdb=vdb.qcow2", "--start", start]))
    stage("start web1")
    stage.guest.go()
    wanted = snapshots(stage, 2)
    golden = (stage.disks / "golden.qcow2").read_bytes()
    stage(f"delete web1 s1 --merge {way}")
    kept_here = {"s2": wanted["s2"]}
    stage.guest.writes_on()
    assert stage.holds("s2") == kept_here["s2"] and len(stage.show()["layers"]) == 5 + (len(guest.DISKS) - 1)
    stage.finish()
    assert (stage.disks / "golden.qcow2").read_bytes() == golden


def test_dirty_bitmaps_are_not_lost(sharing: Stage) -> None:
    """A backup program finds its bitmap again: a way is taken that keeps it, or none."""
    stage = sharing
    stage.start(raw=False)
    wanted = snapshots(stage, 2, 80)
    with stage.qmp() as qmp:
        node = next(each["inserted"]["node-name"] for each in qmp("query-block") if "/vda/" in each.get("qdev", ""))
        qmp("block-dirty-bitmap-add", node=node, name="backup")
    said = stage("delete web1 s2 --merge reflink --plan").out
    assert "dirty bitmaps" in said
    plan = stage("delete web1 s2 --plan --json").json
    assert "pull" in plan["way"]
    stage("delete web1 s2")
    kept(stage, wanted, "s2")
    with stage.qmp() as qmp:
        names = [
            one["name"]
            for each in qmp("query-named-block-nodes", flat=True)
            for one in each.get("dirty-bitmaps", ())
            if one.get("name")
        ]
    assert names == ["backup"]
    stage.finish()


def test_what_another_program_reads_is_left_until_it_has_ended(sharing: Stage) -> None:
    stage = sharing
    stage.start(raw=False)
    wanted = snapshots(stage, 3)
    path = stage.path("s3", "vda")
    reader = subprocess.Popen(
        ["qemu-io", "-r", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdin is not None and reader.stdout is not None
    reader.stdin.write("read 0 512\n")
    reader.stdin.flush()
    while "ops" not in reader.stdout.readline():
        pass
    said = stage("delete web1 s2", status=BUSY)
    reader.stdin.close()
    reader.wait(20)
    stage.guest.writes_on()
    assert stage.holds("s3") == wanted["s3"], said
    stage("gc web1")
    if "s2" in stage.names():
        stage("delete web1 s2")
    kept(stage, wanted, "s2")
    stage.finish()


def test_a_job_of_somebody_elses_keeps_the_swap_off(sharing: Stage) -> None:
    stage = sharing
    guest_ = stage.start(raw=False)
    wanted = snapshots(stage, 3)
    with stage.qmp() as qmp:
        nodes = {each["file"]: each["node-name"] for each in qmp("query-named-block-nodes") if each["drv"] == "qcow2"}
        tip = next(name for file, name in nodes.items() if str(stage.path("main", "vda")) in file)
        qmp("block-stream", job_id="mine", device=tip, speed=1)
    said = stage("delete web1 s2", status=12)
    assert "QEMU" in said.err
    assert {name for name in os.listdir(stage.disks) if "tmp" in name} == set()
    with stage.qmp() as qmp:
        assert [each["id"] for each in qmp("query-jobs")] == ["mine"]
        qmp("block-job-cancel", device="mine", force=True)
    guest_.writes_on()
    stage("gc web1")
    kept(stage, wanted, "s2")
    stage.finish()


def test_layers_of_different_sizes(sharing: Stage) -> None:
    stage = sharing
    stage.start(raw=False)
    snapshots(stage, 1)
    with stage.qmp() as qmp:
        for each in qmp("query-block"):
            if each.get("qdev"):
                qmp("block_resize", node_name=each["inserted"]["node-name"], size=48 << 20)
    stage("snapshot web1 s2")
    stage.guest.writes_on()
    stage("snapshot web1 s3")
    stage.guest.writes_on()
    wanted = {name: stage.holds(name) for name in ("s1", "s2", "s3")}
    for name in ("s2", "s1"):
        plan = stage(f"delete web1 {name} --plan --json").json
        assert plan["way"] == "reflink", plan
        stage(f"delete web1 {name}")
        stage.guest.writes_on()
        assert all(stage.holds(each) == wanted[each] for each in wanted if each in stage.names())
    stage.finish()
    assert stage.holds("s3") == wanted["s3"]
