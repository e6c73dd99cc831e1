"""The processes that stand by: what they run is ours."""

from __future__ import annotations

import pytest
from tests.kit.still import Still


@pytest.mark.parametrize("line", ["snapshot web1 m1 --memory", "delete web1 s1 --merge commit"])
def test_nothing_in_the_folder_that_we_are_in_is_run(still: Still, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    still("snapshot web1 s1")
    still.write(".x")
    (still.folder / "json.py").write_text(f"open({str(still.folder / 'ran')!r}, 'w')")
    monkeypatch.chdir(still.folder)
    still(line)
    assert not (still.folder / "ran").exists()
