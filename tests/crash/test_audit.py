"""The audit finds what is missing; ``tests/crash/test_matrix.py`` lets it look at every operation."""

from __future__ import annotations

from pathlib import Path

from tests.crash.audit import Audit


def test_the_audit_sees_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    inode, other, folder = ((tmp_path / name).stat().st_ino for name in ("a", "b", ""))
    looked = Audit(tmp_path)
    for line in (
        f"pwrite64 {inode} {tmp_path}/a",
        f"fdatasync {inode} {tmp_path}/a",
        "journal 0 take 1",
        f"pwrite64 {inode} {tmp_path}/a",
        f"fsync {inode} {tmp_path}/a",
        "journal 0 take 2",
        f"pwrite64 {other} {tmp_path}/b",
        f"unlink 0 {tmp_path}/b",
        "journal 0 take 3",
        f"pwrite64 {inode} {tmp_path}/a",
        f"rename 0 {tmp_path}/a",
        f"rename {inode} {tmp_path}/c",
        f"fsync {folder} {tmp_path}",
        f"pwrite64 7 {tmp_path}/state/state.sqlite-wal",
        "journal 0 end 'done'",
        "said 0 end",
        f"pwrite64 {inode} {tmp_path}/c",
        f"punch {inode} {tmp_path}/c",
        "fault 0 something is not locked",
    ):
        looked.call(line)
    assert looked.words == 4
    assert [fault.replace(str(tmp_path), "") for fault in looked.faults] == [
        "pwrite64 on /a is not synced when the journal says 'take 1'",
        "unlink /b is not synced when the journal says 'take 3'",
        "pwrite64 on /a is not synced when /c is renamed",
        "pwrite64 on /a is not synced when the journal says \"end 'done'\"",
        "/state/state.sqlite-wal is not synced when the journal has said 'end'",
        "pwrite64 on /c is not synced when holes are punched",
        "something is not locked",
    ]
