"""A QMP session: what of it costs time."""

from __future__ import annotations

import asyncio
import logging

import pytest
from qemu.qmp import Message

from snaptree.qemu.daemon import StorageDaemon


async def _asked() -> None:
    async with StorageDaemon() as daemon:
        assert await daemon.qmp.execute("query-named-block-nodes") == []


def test_messages_are_worded_only_for_a_log_that_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worded = 0
    real = Message.__str__

    def word(message: Message) -> str:
        nonlocal worded
        worded += 1
        return real(message)

    monkeypatch.setattr(Message, "__str__", word)
    asyncio.run(_asked())
    assert worded == 0
    with caplog.at_level(logging.DEBUG, "qemu.qmp"):
        asyncio.run(_asked())
    assert worded > 0 and "query-named-block-nodes" in caplog.text
