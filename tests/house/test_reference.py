"""The reference in ``docs/`` says what the code does."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

from tests.kit.examples import examples

from snaptree import planning
from snaptree.planning.steps import STEPS
from snaptree.planning.verbs import Request

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


def test_every_step_occurs_in_an_example() -> None:
    occurring = {type(step) for _, _, plan in examples() for each in plan.every() for step in each.steps}
    assert [step.kind for step in STEPS if step not in occurring] == []


def test_every_request_has_an_example() -> None:
    """All that a verb can ask for, be it behind the one door for machines that are known or not."""
    modules = [
        importlib.import_module(each.name) for each in pkgutil.iter_modules(planning.__path__, "snaptree.planning.")
    ]
    requests = {
        found
        for module in modules
        for name, found in vars(module).items()
        if name.endswith("Request") and isinstance(found, type)
    }
    assert len(requests) >= len(get_args(Request)) and {type(request) for _, request, _ in examples()} == requests
    titles = [title for title, _, _ in examples()]
    assert len(set(titles)) == len(titles)
