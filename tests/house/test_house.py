"""The house holds: which room may know which, what is pure, who touches files, how large a room is, what loads when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "snaptree"
MAY_KNOW = {
    "model": set(),
    "planning": {"model"},
    "images": {"planning", "model"},
    "qemu": {"images", "planning", "model"},
    "store": {"planning", "model"},
    "running": {"images", "qemu", "store", "planning", "model"},
    "machines": {"running", "images", "qemu", "store", "planning", "model"},
    "cli": {"machines", "running", "planning", "model"},
}
"""cli -> machines -> running -> (images, qemu, store) -> planning -> model; ``errors`` is known to all."""
PURE = ("model", "planning")
UNCLEAN = {"os", "io", "sqlite3", "subprocess", "socket", "asyncio", "time", "pathlib", "shutil", "random", "secrets"}
CHANGES_FILES = {
    "unlink", "rename", "replace", "link", "symlink", "truncate", "ftruncate", "pwrite", "write", "remove", "rmtree",
    "fsync", "fdatasync", "chmod", "chown", "fchmod", "fchown", "mkdir", "setxattr", "copyfile", "copy", "move",
}  # fmt: skip


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0]
        yield room, path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way() -> None:
    found = []
    for room, path, tree in modules():
        if room not in MAY_KNOW:
            continue
        for name in imports(tree):
            first, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if first == "snaptree" and other in MAY_KNOW and other not in MAY_KNOW[room] | {room}:
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    assert found == []


def test_every_room_is_known() -> None:
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(MAY_KNOW)
    assert "utils" not in {path.stem for path in SOURCE.rglob("*")}


def test_model_and_planning_do_no_input_or_output() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for room, path, tree in modules()
        if room in PURE
        for name in imports(tree)
        if name.split(".")[0] in UNCLEAN
    ]
    found += [
        f"{path.relative_to(ROOT)} calls {node.func.id}"
        for room, path, tree in modules()
        if room in PURE
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "print", "input")
    ]
    assert found == []


def test_one_module_changes_files() -> None:
    """Its rights and small files are modules of their own, and the state's folder is made by the store; nothing else
    changes files."""
    # Sockets live no longer than their process, and are never synced.
    allowed = {"images/durable.py", "images/rights.py", "images/small.py", "running/sockets.py"}
    folder = {("store/database.py", "chmod"), ("store/database.py", "fsync")}
    found = []
    for _, path, tree in modules():
        name = str(path.relative_to(SOURCE))
        if name in allowed:
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("os", "shutil")
                and node.func.attr in CHANGES_FILES
                and (name, node.func.attr) not in folder
            ):
                found.append(f"{name}:{node.lineno} {node.func.value.id}.{node.func.attr}")
    assert found == []


def test_libvirt_is_told_by_its_official_calls_alone() -> None:
    """The monitor's taint a domain, and libvirt does not know what they change."""
    for _, path, tree in modules():
        assert not [name for name in imports(tree) if name.split(".")[0] in ("libvirt_qemu", "libvirt_lxc")], path
        text = path.read_text(encoding="utf-8")
        assert "qemu-monitor-command" not in text and "qemuMonitorCommand" not in text, path


def test_no_module_holds_two_things() -> None:
    long = {str(path.relative_to(ROOT)): count for _, path, _ in modules() if (count := lines(path)) > 450}
    assert long == {}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (["--version"], ["numpy", "rich", "asyncio", "sqlite3", "qemu", "lxml", "snaptree.machines"]),
        (["list"], ["numpy", "rich", "asyncio", "qemu", "lxml"]),
        (["path", "nothing"], ["numpy", "rich", "asyncio", "qemu", "lxml"]),
        (["tree", "nothing"], ["numpy", "rich", "asyncio", "qemu", "lxml"]),
    ],
)
def test_start_up_imports_only_what_is_needed(words: list[str], without: list[str], tmp_path: Path) -> None:
    script = f"import sys; from snaptree.cli.main import run; run({words!r}); print(*sys.modules, file=sys.stderr)"
    place = {"SNAPTREE_STATE": str(tmp_path / "state"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], env=place, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "click" in loaded
    assert [name for name in without if name in loaded] == []


def test_every_step_says_what_a_crash_leaves() -> None:
    from snaptree.planning.steps import STEPS

    assert len({step.kind for step in STEPS}) == len(STEPS)
    for step in STEPS:
        assert step.__doc__ and step.crash and step.kind
