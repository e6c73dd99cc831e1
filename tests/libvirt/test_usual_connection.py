"""Where no connection was named: that of a daemon whose socket is there, be it libvirtd or one of the modular ones.

virtqemud speaks as libvirtd does. The tests' libvirtd stands in for it, under the name of its socket and no other: that
is all by which libvirt's own client chooses, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.kit.domain import URI, DomainScene
from tests.kit.scene import TOOL

pytestmark = pytest.mark.root
NO_BINDING = [sys.executable, "-c", "import sys; sys.modules['libvirt'] = None; " + TOOL[2].partition("; ")[2]]
"""Where libvirt's Python binding is not installed."""


def said(
    web: DomainScene, place: Path, *words: str, user: int = 0, run: Sequence[str] = TOOL
) -> subprocess.CompletedProcess[str]:
    """What the command says to one for whom that folder is ``/run``, and who has named no connection."""
    private = ["unshare", "--mount", "sh", "-c", f'mount --bind {place} /run && exec "$@"', "sh"]
    other = ["setpriv", "--reuid", str(user), "--clear-groups"] if user else []
    unnamed = {key: value for key, value in os.environ.items() if key not in (URI, "XDG_RUNTIME_DIR")}
    return subprocess.run(
        [*private, *other, *run, *words],
        env={**unnamed, "SNAPTREE_STATE": str(web.state) if not user else "/nonexistent/state"},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )


@pytest.mark.parametrize("socket", ["libvirt-sock", "virtqemud-sock"])
def test_the_daemon_that_is_there_is_asked(web: DomainScene, tmp_path: Path, socket: str) -> None:
    place = tmp_path / "run"
    (place / "libvirt").mkdir(parents=True)
    found = said(web, place, "list", "--json")
    assert (found.returncode, json.loads(found.stdout)) == (0, []), found
    assert "no libvirt runs here" in said(web, place, "tree", web.name).stderr
    real = Path(web.own.uri.split("socket=")[1])
    (place / "libvirt" / socket).symlink_to(real)
    # The client of libvirt 11.3 looks for no other name than the daemon's, and goes by it.
    found = said(web, place, "list", "--json")
    assert web.name in {row["machine"] for row in json.loads(found.stdout)}, found
    # Without a word, too.
    assert web.name in said(web, place).stdout
    assert said(web, place, "snapshot", web.name, "s1").returncode == 0
    assert web.listed() == {"s1": None}


def test_a_daemon_that_could_be_asked_but_for_the_binding(web: DomainScene, tmp_path: Path) -> None:
    """That the machine is none of those that were added is half the truth: the other half is why no domain is."""
    place = tmp_path / "run"
    (place / "libvirt").mkdir(parents=True)
    (place / "libvirt" / "libvirt-sock").symlink_to(Path(web.own.uri.split("socket=")[1]))
    found = said(web, place, "tree", web.name, run=NO_BINDING)
    assert found.returncode == 3 and "virsh list" not in found.stderr, found
    assert "libvirt's Python binding is not installed: install snaptree[libvirt]" in found.stderr, found
    found = said(web, place, "list", "--json", run=NO_BINDING)
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "[]", ""), found


def test_a_socket_that_one_may_not_use_is_not_asked(web: DomainScene, tmp_path: Path) -> None:
    """Whoever has machines of his own need not see why the system's are not his."""
    place = tmp_path / "run"
    (place / "libvirt").mkdir(parents=True)
    place.chmod(0o755)
    real = Path(web.own.uri.split("socket=")[1])
    (place / "libvirt" / "virtqemud-sock").symlink_to(real)
    mode = real.stat().st_mode
    real.chmod(0o700)
    try:
        found = said(web, place, "list", "--json", user=65534)
    finally:
        real.chmod(mode)
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "[]", ""), found
