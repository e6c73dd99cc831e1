"""virsh's own deletion, interrupted by the death of what carries it out (row B9): libvirtd's, and QEMU's besides."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.domain import DomainScene, VirshRefusal, domain_scene, goes_on, refused
from tests.kit.images import MiB
from tests.kit.libvirtd import Libvirtd, libvirtd_or_skip
from tests.kit.stage import kill_and_wait

pytestmark = [pytest.mark.root, pytest.mark.slow]
PART = 48 * MiB


@pytest.fixture
def large() -> Iterator[DomainScene]:
    """A domain with snapshots of virsh's, between which much was written; its libvirtd comes back when it dies."""
    with libvirtd_or_skip(lasting=True) as own, domain_scene(own) as web:
        images.create(web.disks / "web.qcow2", 2 * PART)
        web.define("vda=web.qcow2")
        for number in (1, 2, 3):
            web.virsh("snapshot-create-as", "@", f"s{number}", "--disk-only")
            path, form = web.source()
            images.io(path, form, f"write -q -P {ord('0') + number} {(number - 1) * PART // 2} {PART}")
        yield web


def occupied(path: Path) -> int:
    """The bytes that it takes."""
    return path.stat().st_blocks * 512


def interrupted(web: DomainScene, own: Libvirtd, name: str, grows: Path, *, also_qemu: bool) -> None:
    """virsh deletes a snapshot; in the middle libvirtd is killed, and it begins anew."""
    before = occupied(grows)
    process = subprocess.Popen(
        ["virsh", "-q", "-c", own.uri, "snapshot-delete", web.name, name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 60
    while occupied(grows) < before + MiB:
        assert time.monotonic() < until and process.poll() is None, process.communicate()
    daemon = own.process()
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    if also_qemu:
        kill_and_wait(web.folder)
    assert process.wait(60) != 0
    own.wait()
    until = time.monotonic() + 60
    # That its QEMU has died libvirt may notice only just now.
    with contextlib.suppress(VirshRefusal):
        while web.virsh("blockjob", "@", "vda").strip():
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.parametrize("also_qemu", [False, True])
@pytest.mark.parametrize("state", ["off", "running"])
def test_b9_snaptree_finishes_it(large: DomainScene, state: str, *, also_qemu: bool) -> None:
    """What 's2' showed is lost, by libvirt; all else is there."""
    web = large
    web.be(state)
    wanted = {name: web.shows(name) for name in ("s1", "s3", "main")}
    interrupted(web, web.own, "s2", web.path("s2"), also_qemu=also_qemu)
    if state == "off" and web.runs():
        # libvirt has started it for this, paused, and leaves it so.
        assert "a block commit on vda is under way" in web("delete @ s2", status=5).err
        web.be("off")
    else:
        web.be(state)
    assert "was target of not completed snapshot delete" in refused(web, "snapshot-delete", "@", "s1")
    (found,) = [each for each in web.findings(web.name) if each["severity"] == "error"]
    assert found["kind"] == "half-merged" and found["affects"] == ["s2"], found
    assert found["hint"].startswith(f"'snaptree delete {web.name} s2'")
    for words in ("revert @ s2", "branch @ new --from s2"):
        assert f"half-merged\n  hint: finish the merge with 'snaptree delete {web.name} s2'" in web(words, status=6).err
    assert {name: web.shows(name) for name in wanted} == wanted
    web("delete @ s2")
    web.sound()
    assert {name: web.shows(name) for name in wanted} == wanted and "half-merged" not in web("show @").out
    goes_on(web, "s1")
