"""Which forms of memory a QEMU is trusted with."""

from __future__ import annotations

import pytest

from snaptree.qemu.memory import Settings, forms_known

OLD = ("xbzrle", "multifd", "background-snapshot", "zero-copy-send")
"""Of QEMU 7.2; a guest hangs there for ever when saving in the background has failed."""


@pytest.mark.parametrize(
    ("capabilities", "forms"),
    [
        (OLD, ("plain",)),
        ((*OLD, "switchover-ack"), ("background", "plain")),
        ((*OLD, "switchover-ack", "mapped-ram"), ("background", "mapped-ram", "plain")),
        ((), ("plain",)),
    ],
)
def test_forms_by_capabilities(capabilities: tuple[str, ...], forms: tuple[str, ...]) -> None:
    assert forms_known(Settings(dict.fromkeys(capabilities, False), {})) == forms
