"""A plugin of pytest's that tells by which mutants each test comes, and which one is running."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit.mutation import reached, start

WANTED = os.environ.get("SNAPTREE_REACHED_BY_TEST")
RUNNING = os.environ.get("SNAPTREE_RUNNING_TEST")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if RUNNING is not None:
        Path(RUNNING).write_text(item.nodeid, encoding="utf-8")
    if WANTED is None:
        return (yield)
    began = time.monotonic()
    told = Path(WANTED + ".now")
    start(told)
    try:
        return (yield)
    finally:
        line = [item.nodeid, round(time.monotonic() - began, 3), reached(told)]
        with open(WANTED, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
