"""Chains through the gate: what is followed, what is refused, and what QEMU is then given."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from snaptree.errors import NotFoundError, RefusedError, SnaptreeError, UnhealthyError, UsageError
from snaptree.images import gate


def qemu_img(*arguments: str) -> str:
    return subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, text=True).stdout


def create(path: Path, backing: str | None = None, backing_format: str = "qcow2", size: str = "1M") -> Path:
    options = ("-b", backing, "-F", backing_format, "-u") if backing is not None else ()
    qemu_img("create", "-q", "-f", "qcow2", *options, f"{path.parent}/{path.name}", size)
    return path


def test_follows_a_chain_to_a_raw_root(tmp_path: Path) -> None:
    (tmp_path / "root.img").write_bytes(b"QFI\xfb" + bytes(4092))  # A guest wrote this; it stays raw.
    create(tmp_path / "a.qcow2", "root.img", "raw")
    top = create(tmp_path / "b.qcow2", str(tmp_path / "a.qcow2"))
    links = gate.read_chain(str(top), None)
    assert [os.path.basename(each.path) for each in links] == ["b.qcow2", "a.qcow2", "root.img"]
    assert [each.facts.format for each in links] == ["qcow2", "qcow2", "raw"]
    assert [each.facts.backing for each in links] == [links[1].path, links[2].path, None]


@pytest.mark.parametrize(
    "name", ["json:{}", "nbd:localhost:1", "file:base.qcow2", "nbd+unix:///x", "a:b", "base\n.qcow2", "ssh://h/x"]
)
def test_refuses_names_that_are_no_plain_files(tmp_path: Path, name: str) -> None:
    top = create(tmp_path / "t.qcow2", "x" * len(name))
    content = top.read_bytes()
    top.write_bytes(content.replace(b"x" * len(name), name.encode(), 1))
    with pytest.raises(RefusedError) as caught:
        gate.read_chain(str(top), "qcow2")
    assert str(top) in caught.value.message and caught.value.hint


def test_refuses_loops_before_qemu_hangs_in_them(tmp_path: Path) -> None:
    top = create(tmp_path / "a.qcow2", "b.qcow2")
    create(tmp_path / "b.qcow2", "a.qcow2")
    with pytest.raises(UnhealthyError, match="loop"):
        gate.read_chain(str(top), "qcow2")
    itself = create(tmp_path / "c.qcow2", "d.qcow2")
    os.link(itself, tmp_path / "d.qcow2")  # By another name, it is the same file.
    with pytest.raises(UnhealthyError, match="loop"):
        gate.read_chain(str(itself), "qcow2")


def test_chains_end_at_200_layers(tmp_path: Path) -> None:
    seed = create(tmp_path / "s.qcow2", "l0000.qcow2").read_bytes()
    for number in range(201):
        (tmp_path / f"l{number:04}.qcow2").write_bytes(seed.replace(b"l0000", f"l{number + 1:04}".encode()))
    create(tmp_path / "l0200.qcow2")
    assert len(gate.read_chain(str(tmp_path / "l0001.qcow2"), "qcow2")) == 200
    with pytest.raises(RefusedError, match="more than 200"):
        gate.read_chain(str(tmp_path / "l0000.qcow2"), "qcow2")


def test_a_backing_file_elsewhere_has_to_be_allowed(tmp_path: Path) -> None:
    golden = tmp_path / "golden"
    golden.mkdir()
    create(golden / "lower.qcow2")
    create(golden / "base.qcow2", "lower.qcow2")
    top = create(tmp_path / "t.qcow2", "golden/base.qcow2")
    with pytest.raises(RefusedError) as caught:
        gate.read_chain(str(top), "qcow2")
    assert f"--base {golden / 'base.qcow2'}" in caught.value.hint
    with pytest.raises(RefusedError) as caught:  # The base may name what it likes, too.
        gate.read_chain(str(top), "qcow2", bases=[str(golden / "base.qcow2")])
    assert f"--base {golden / 'lower.qcow2'}" in caught.value.hint
    both = [str(golden / "base.qcow2"), str(golden / "lower.qcow2")]
    assert len(gate.read_chain(str(top), "qcow2", bases=both)) == 3
    secret = create(tmp_path / "s.qcow2", "/etc/passwd", "raw")
    with pytest.raises(RefusedError):
        gate.read_chain(str(secret), "qcow2")
    (tmp_path / "hidden.img").symlink_to("/etc/passwd")
    with pytest.raises(RefusedError):
        gate.read_chain(str(create(tmp_path / "u.qcow2", "hidden.img", "raw")), "qcow2")


def test_formats_have_to_agree(tmp_path: Path) -> None:
    (tmp_path / "root.img").write_bytes(bytes(4096))
    says_qcow2 = create(tmp_path / "a.qcow2", "root.img", "qcow2")
    with pytest.raises(UnhealthyError, match="not the qcow2 image"):
        gate.read_chain(str(says_qcow2), "qcow2")
    says_vmdk = create(tmp_path / "b.qcow2", "root.img", "vmdk")
    with pytest.raises(RefusedError):
        gate.read_chain(str(says_vmdk), "qcow2")
    with pytest.raises(UsageError) as caught:
        gate.read_chain(str(tmp_path / "root.img"), None)
    assert "format=raw" in caught.value.hint


def test_a_missing_format_is_found_or_asked_for(tmp_path: Path) -> None:
    create(tmp_path / "base.qcow2")
    os.rename(create(tmp_path / "x.qcow2"), tmp_path / "base.img")
    for name, good in (("base.qcow2", True), ("base.img", False)):
        top = create(tmp_path / f"on-{name}.qcow2", name)
        content = bytearray(top.read_bytes())
        at = content.index(struct.pack(">I", 0xE2792ACA))
        content[at : at + 4] = struct.pack(">I", 0x12345678)  # An extension that nobody knows.
        top.write_bytes(content)
        if good:
            assert gate.read_chain(str(top), "qcow2")[1].facts.format == "qcow2"
            continue
        with pytest.raises(UnhealthyError) as caught:
            gate.read_chain(str(top), "qcow2")
        assert "-F FORMAT" in caught.value.hint
        given = gate.read_chain(str(top), "qcow2", formats={str(tmp_path / name): "raw"})
        assert given[1].facts.format == "raw"


def test_what_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        gate.read_chain(str(tmp_path / "none.qcow2"), "qcow2")
    with pytest.raises(UnhealthyError, match="is not there"):
        gate.read_chain(str(create(tmp_path / "a.qcow2", "none.qcow2")), "qcow2")
    corrupt = create(tmp_path / "c.qcow2")
    with corrupt.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 2))
    with pytest.raises(UnhealthyError, match="corrupt"):
        gate.read_chain(str(corrupt), "qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/d.raw", f"{tmp_path}/d.qcow2", "1M")
    with pytest.raises(RefusedError, match="another file"):
        gate.read_chain(str(tmp_path / "d.qcow2"), "qcow2")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnhealthyError):
        gate.read_chain(str(create(tmp_path / "p.qcow2", "pipe", "raw")), "qcow2")


def test_the_dirty_bit_is_normal_in_a_tip_only(tmp_path: Path) -> None:
    base = create(tmp_path / "a.qcow2")
    with base.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 1))
    assert gate.read_chain(str(base), "qcow2")[0].facts.dirty
    with pytest.raises(UnhealthyError, match="not closed cleanly"):
        gate.read_chain(str(create(tmp_path / "b.qcow2", "a.qcow2")), "qcow2")


def test_a_link_beside_another_backing_file(tmp_path: Path) -> None:
    """QEMU resolves a relative name beside the link; the image's own folder has another file of that name."""
    for folder in ("real", "link"):
        (tmp_path / folder).mkdir()
        create(tmp_path / folder / "base.qcow2")
    create(tmp_path / "real" / "top.qcow2", "base.qcow2")
    (tmp_path / "link" / "top.qcow2").symlink_to(tmp_path / "real" / "top.qcow2")
    with pytest.raises(RefusedError, match="symbolic link"):
        gate.read_chain(str(tmp_path / "link" / "top.qcow2"), "qcow2")
    os.unlink(tmp_path / "link" / "base.qcow2")
    links = gate.read_chain(str(tmp_path / "link" / "top.qcow2"), "qcow2")
    assert [each.path for each in links] == [
        str(tmp_path / "real" / "top.qcow2"),
        str(tmp_path / "real" / "base.qcow2"),
    ]


def test_relative_names(tmp_path: Path) -> None:
    overlay = str(tmp_path / "a" / "o.qcow2")
    assert gate.relative_backing_name(overlay, str(tmp_path / "a" / "b.qcow2")) == "b.qcow2"
    assert gate.relative_backing_name(overlay, str(tmp_path / "b.qcow2")) == "../b.qcow2"
    colon = gate.relative_backing_name(overlay, str(tmp_path / "a" / "nbd:x.qcow2"))
    assert colon == "./nbd:x.qcow2"
    assert gate.resolve_backing(overlay, colon) == str(tmp_path / "a" / "nbd:x.qcow2")
    deep = "/" + "d" * 200
    far = deep * 4 + "/o.qcow2"
    assert gate.relative_backing_name("/" + "x/" * 450 + "o.qcow2", far) == far  # Shorter than so many "..".
    with pytest.raises(RefusedError):
        gate.relative_backing_name(overlay, deep * 6)


def test_a_colon_in_a_name_opens_in_qemu(tmp_path: Path) -> None:
    create(tmp_path / "plain.qcow2")
    os.rename(tmp_path / "plain.qcow2", tmp_path / "nbd:base.qcow2")
    create(tmp_path / "o.qcow2", gate.relative_backing_name(str(tmp_path / "o.qcow2"), f"{tmp_path}/nbd:base.qcow2"))
    links = gate.read_chain(str(tmp_path / "o.qcow2"), "qcow2")
    assert len(links) == 2
    found = json.loads(qemu_img("info", "--output=json", "--backing-chain", f"{tmp_path}/o.qcow2"))
    assert len(found) == 2


def test_finds_overlays_by_inode(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2")
    create(tmp_path / "one.qcow2", "base.qcow2")
    create(tmp_path / "two.img", str(base))
    create(tmp_path / "other.qcow2", "one.qcow2")
    create(tmp_path / ".snaptree-x", "base.qcow2")
    create(tmp_path / "bad.qcow2", "json:{}")
    (tmp_path / "broken.qcow2").write_bytes(b"QFI\xfb\0\0")
    os.mkfifo(tmp_path / "pipe.qcow2")
    status = base.stat()
    found = gate.find_overlays([str(tmp_path), str(tmp_path / "none")], {(status.st_dev, status.st_ino)})
    assert [os.path.basename(overlay) for overlay, _ in found] == ["one.qcow2", "two.img"]
    assert {backing for _, backing in found} == {str(base)}


def test_graphs_open_in_qemu_and_override_headers(tmp_path: Path) -> None:
    (tmp_path / "root.img").write_bytes(b"\x11" * 65536)
    top = create(tmp_path / "o.qcow2", "nothing-here.img", "raw", size="64k")
    graph = gate.graph([(str(top), "qcow2"), (str(tmp_path / "root.img"), "raw")])
    assert graph["driver"] == "qcow2" and graph["backing"]["driver"] == "raw"
    assert graph["backing"]["file"]["driver"] == "file" and "backing" not in graph["backing"]
    command = ["qemu-io", "-r", "-c", "read -P 0x11 0 64k", "json:" + json.dumps(graph)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "read 65536/65536" in done.stdout, done.stdout + done.stderr
    alone = gate.blockdev(str(top), "qcow2", "n0", None)
    assert alone["backing"] is None and alone["node-name"] == "n0" and alone["file"]["node-name"] == "n0-file"


def test_every_error_says_what_to_do(tmp_path: Path) -> None:
    for path in (create(tmp_path / "a.qcow2", "none.qcow2"), tmp_path / "none.img"):
        with pytest.raises(SnaptreeError) as caught:
            gate.read_chain(str(path), None)
        assert caught.value.hint and not caught.value.message.endswith(".")
