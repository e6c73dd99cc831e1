"""What reaches the disk, and when; ``tests/crash/audit.py`` says how it is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.crash.audit import Audit
from tests.crash.cases import CASES
from tests.kit import shim


def audits(*words: str) -> list[dict[str, Any]]:
    return shim.rows("audit", *words, environment=shim.place(memory=False))


@pytest.mark.timeout(300)
def test_all_is_synced_before_the_journal_says_more() -> None:
    found = audits()
    assert [each["case"] for each in found] == list(CASES)
    assert sum(each["words"] for each in found) > 400
    assert [(each["case"], each["faults"]) for each in found if each["faults"]] == []


@pytest.mark.timeout(300)
def test_all_is_synced_in_recovery_too() -> None:
    found = audits("--killed")
    assert sum(each["words"] for each in found) > 60
    assert [(each["case"], each["faults"]) for each in found if each["faults"]] == []


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
        "journal 0 end 'done'",
    ):
        looked.call(line)
    assert looked.words == 4
    assert [fault.replace(str(tmp_path), "") for fault in looked.faults] == [
        "pwrite64 on /a is not synced when the journal says 'take 1'",
        "unlink /b is not synced when the journal says 'take 3'",
        "pwrite64 on /a is not synced when the journal says \"end 'done'\"",
    ]
