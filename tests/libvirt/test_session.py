"""A user's own libvirt, ``qemu:///session``, whose domains run as the user, and whose state is the user's."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.domain import define_text
from tests.kit.scene import SLOT, SLOTS, TOOL, word_of
from tests.kit.stage import kill_and_wait

pytestmark = [pytest.mark.root, pytest.mark.slow]
USER = 65534
AS_USER = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--pdeathsig", "KILL"]


class Session:
    """A user with a libvirtd."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment: dict[str, str] = {
            **{key: value for key, value in os.environ.items() if key not in ("SNAPTREE_STATE", "LIBVIRT_DEFAULT_URI")},
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_STATE_HOME": str(home / "state"),
            "XDG_DATA_HOME": str(home / "data"),
        }

    def __call__(self, *words: str | Path) -> str:
        """What a command of the user's prints."""
        done = subprocess.run(
            [*AS_USER, *map(str, words)],
            env=self.environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def snaptree(self, line: str) -> str:
        """What ``snaptree LINE`` prints."""
        return self(*TOOL, *line.split())

    def virsh(self, *words: str | Path) -> str:
        """What virsh prints."""
        return self("virsh", "-q", "-c", "qemu:///session", *words)


@pytest.fixture
def session() -> Iterator[Session]:
    """A user whose libvirtd runs."""
    pytest.importorskip("libvirt")
    for tool in ("libvirtd", "virsh", "setpriv"):
        if shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
            pytest.skip(f"{tool} is not installed")
    # Sockets have short names.
    home = Path(f"/tmp/snaptree-session-{os.getpid()}")
    home.mkdir()
    user = Session(home)
    for name in ("run", "config/libvirt", "cache", "state", "data"):
        (home / name).mkdir(parents=True)
    (home / "config/libvirt/qemu.conf").write_text('stdio_handler = "file"\nsecurity_driver = "none"\n')
    for each in (home, *home.rglob("*")):
        os.chown(each, USER, USER)
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    process = subprocess.Popen(
        [*AS_USER, "libvirtd"],
        env={**user.environment, "PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 30
        while not (home / "run/libvirt/libvirt-sock").exists():
            assert process.poll() is None and time.monotonic() < until, "libvirtd does not come"
            time.sleep(0.05)
        yield user
    finally:
        with contextlib.suppress(OSError):
            kill_and_wait(home)
        # Told to end, it now and then does not.
        process.kill()
        process.wait()
        shutil.rmtree(home)


def test_a_users_own_domains(session: Session) -> None:
    disk = images.create(session.home / "web.qcow2", SLOTS * SLOT)
    images.io(disk, "qcow2", f"write -P {ord('b')} 0 {SLOT}")
    os.chown(disk, USER, USER)
    text = session.home / "web.xml"
    text.write_text(define_text("web", "7d2d9a52-3c3f-4f5a-8d53-3c1c54f8d0a1", [("vda", disk, "qcow2")]))
    session.virsh("define", text)
    # Without a word of which: that of the user's daemon, which runs.
    assert "web" in session.snaptree("list")
    session.snaptree("snapshot web s1")
    tip = Path(session.snaptree("path web").strip())
    assert (tip.stat().st_uid, tip.parent) == (USER, session.home)
    images.io(tip, "qcow2", f"write -P {ord('1')} {SLOT} {SLOT}")
    session.snaptree("revert web s1")
    session.virsh("start", "web")
    session.snaptree("snapshot web s2")
    session.snaptree("delete web s2")
    session.snaptree("--connect qemu:///session switch web main.1")
    assert session.virsh("domstate", "web").strip() == "running"
    session.virsh("destroy", "web")
    assert word_of(images.read(session.snaptree("path web").strip())) == "b1......"
    assert session.virsh("snapshot-list", "web", "--name").split() == ["main", "s1"]
    session.snaptree("delete web --branch main")
    session.snaptree("delete web s1")
    assert sorted(path.name for path in session.home.glob("*.qcow2")) == ["web.qcow2"]
    assert (session.home / "state/snaptree").is_dir()
    assert word_of(images.read(disk)) == "b1......"


def test_a_users_modular_daemon(session: Session) -> None:
    """virtqemud has another socket, and speaks the same."""
    text = session.home / "web.xml"
    disk = images.create(session.home / "web.qcow2", SLOTS * SLOT)
    os.chown(disk, USER, USER)
    text.write_text(define_text("web", "7d2d9a52-3c3f-4f5a-8d53-3c1c54f8d0a2", [("vda", disk, "qcow2")]))
    session.virsh("define", text)
    folder = session.home / "run/libvirt"
    (folder / "libvirt-sock").rename(folder / "virtqemud-sock")
    assert "web" in session.snaptree("list")
    session.snaptree("snapshot web s1")
    assert session.virsh("snapshot-list", "web", "--name").split() == ["s1"]
