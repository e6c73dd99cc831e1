"""A libvirtd of one's own, in namespaces of its own and on folders of its own; one that runs already is not touched.

It sees the machine's file systems as they are mounted when it starts, but ``/run``, ``/etc/libvirt``,
``/var/lib/libvirt``, ``/var/cache`` and ``/var/log`` are its own. It and every QEMU that it starts end with the block,
and with this process however it dies: they are a process namespace of their own, which the kernel ends as a whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECONDS = 30.0
"""How long it may take to answer."""
_PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
_OWN = {
    "run": "/run",
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache",
    "log": "/var/log",
}
_DAEMON = """
auth_unix_rw = "none"
auth_unix_ro = "none"
"""
AS_ROOT = """
user = "root"
group = "root"
dynamic_ownership = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""
"""``qemu.conf`` for QEMUs that run as root and whose images are not labelled."""
LABELLED = """
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""
"""``qemu.conf`` for QEMUs that run as libvirt's own user, with the images' owners changed as by default."""


_LET_GO = """
while read -r device where rest; do
  case $device in /dev/loop*) case $where/ in {keep}/*) ;; *) umount "$where" || true ;; esac ;; esac
done < /proc/mounts
"""


class LibvirtUnavailable(Exception):
    """libvirtd cannot be started here; the text says why."""


@dataclass(frozen=True)
class Libvirtd:
    """One that answers."""

    uri: str
    log: Path

    def process(self) -> int | None:
        """The daemon's process; ``None`` while there is none."""
        for each in Path("/proc").glob("[0-9]*"):
            try:
                if (each / "comm").read_text() != "libvirtd\n":
                    continue
                if f"{self.log.parent}/run /run " in (each / "mountinfo").read_text():
                    return int(each.name)
            except OSError:
                continue
        return None

    def wait(self) -> None:
        """Wait until one that was killed is there again, and answers."""
        until = time.monotonic() + SECONDS
        while subprocess.run(["virsh", "-q", "-c", self.uri, "list"], capture_output=True, check=False).returncode:
            assert time.monotonic() < until, "libvirtd has not come back"
            time.sleep(0.05)

    def virsh(self, *words: str | Path) -> str:
        """What ``virsh`` prints.

        :raise subprocess.CalledProcessError: it failed.
        """
        command = ["virsh", "-q", "-c", self.uri, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def libvirtd(qemu_conf: str = AS_ROOT, keep: Path | None = None, *, lasting: bool = False) -> Iterator[Libvirtd]:
    """A libvirtd for the block.

    :param qemu_conf: the text of its ``qemu.conf``.
    :param keep: of the file systems on loop devices it sees those that are mounted there. Others it would keep from
        being mounted again elsewhere, once they have been unmounted.
    :param lasting: when it is killed another one takes its place, as where systemd looks after it.
    :raise LibvirtUnavailable: it is not installed, this is not root, or it does not answer.
    """
    if os.geteuid() != 0:
        raise LibvirtUnavailable("libvirtd needs root here")
    for tool in ("libvirtd", "virtlogd", "virsh", "unshare", "setpriv"):
        if shutil.which(tool, path=_PATH) is None:
            raise LibvirtUnavailable(f"{tool} is not installed")
    # The name of a socket has at most 107 characters; a test's own folder is too deep for that.
    place = Path(tempfile.mkdtemp(prefix="snaptree-libvirt-", dir="/tmp"))
    try:
        for each in _OWN:
            (place / each).mkdir()
        # Between two of one host nothing is migrated.
        (place / "etc" / "libvirtd.conf").write_text(f'{_DAEMON}host_uuid = "{uuid.uuid4()}"\n')
        (place / "etc" / "qemu.conf").write_text(qemu_conf)
        for each in ("virtlogd.conf", "libvirt.conf"):
            (place / "etc" / each).touch()
        # QEMU may run as another user, and has to come to its sockets.
        place.chmod(0o755)
        binds = "; ".join(f"mount --bind {place}/{own} {there}" for own, there in _OWN.items())
        # The shell stays, as the first process of the namespace: it is the one that reaps what the others leave.
        let_go = _LET_GO.format(keep=keep or "/dev/null")
        daemon = "while true; do libvirtd --timeout 0 || true; done" if lasting else "libvirtd --timeout 0"
        script = f"set -e{let_go}{binds}; virtlogd --timeout 0 & {daemon} & wait"
        words = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        with (place / "output").open("wb") as output:
            process = subprocess.Popen(
                [*words, "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": _PATH},
                start_new_session=True,
            )
        try:
            found = Libvirtd(f"qemu+unix:///system?socket={place}/run/libvirt/libvirt-sock", place / "output")
            _wait(found, process)
            yield found
        finally:
            process.kill()
            process.wait()
    finally:
        _remove(place)


@contextlib.contextmanager
def libvirtd_or_skip(
    qemu_conf: str = LABELLED, keep: Path | None = None, *, lasting: bool = False
) -> Iterator[Libvirtd]:
    """One for tests that use it by libvirt's binding, which are skipped where there can be none; images are labelled as
    by default."""
    import pytest

    pytest.importorskip("libvirt")
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(libvirtd(qemu_conf, keep, lasting=lasting))
        except LibvirtUnavailable as error:
            pytest.skip(str(error))
        yield found


def _wait(found: Libvirtd, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + SECONDS
    said = ""
    while time.monotonic() < until and process.poll() is None:
        done = subprocess.run(["virsh", "-q", "-c", found.uri, "list"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        said = done.stderr.strip()
        time.sleep(0.05)
    text = found.log.read_text(errors="replace").strip() or said
    raise LibvirtUnavailable(f"libvirtd does not answer: {text.splitlines()[-1] if text else 'it says nothing'}")


def _remove(place: Path) -> None:
    """Remove its folder; its processes may take a moment to let go of it."""
    until = time.monotonic() + 5.0
    while True:
        try:
            shutil.rmtree(place)
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
