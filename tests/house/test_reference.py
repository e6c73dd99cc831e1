"""The reference in ``docs/`` says what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_is_made_from_the_code() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "reference", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nrun scripts/reference"


def test_the_readme_names_files_that_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for word in text.replace("`", " ").replace("(", " ").replace(")", " ").split():
        if word.startswith(("src/", "docs/", "scripts/", "./scripts/", "tests/", "bench/")):
            assert (ROOT / word.rstrip(".,:;")).exists(), word
