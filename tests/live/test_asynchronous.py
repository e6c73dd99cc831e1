"""A machine that runs, from a program."""

from __future__ import annotations

import asyncio

import pytest
from tests.kit.stage import Stage

import snaptree
from snaptree.errors import BusyError, RefusedError, UsageError


def test_a_machine_is_started_gone_back_with_and_stopped(stage: Stage) -> None:
    stage.add("--start", stage.boot.command(stage.folder))

    async def story() -> None:
        async with snaptree.connect(str(stage.state)) as machines:
            web1 = machines["web1"]
            assert await web1.start() == "running"
            assert (await web1.show())["state"] == "running"
            with pytest.raises(BusyError, match="running already"):
                await web1.start()
            stage.guest.go()
            await web1.snapshot("s1")
            stage.guest.writes_on()
            with stage.qmp() as qmp:
                qmp("stop")
            with pytest.raises(RefusedError, match="paused"):
                await web1.stop()
            with stage.qmp() as qmp:
                qmp("cont")
            assert await web1.stop() == "it has shut down"
            assert await web1.stop() == "it was off"
            held = stage.holds("s1")
            await web1.revert("s1", power="paused")
            assert (await web1.show())["state"] == "paused"
            assert await web1.stop(force=True) == "it was turned off"
            assert stage.holds("main") == held

    asyncio.run(story())
    stage.sound()


def test_a_machine_without_a_command_is_not_started(stage: Stage) -> None:
    stage.add()

    async def story() -> None:
        async with snaptree.connect(str(stage.state)) as machines:
            with pytest.raises(UsageError, match="no start command"):
                await machines["web1"].start()
            assert await machines["web1"].stop() == "it was off"

    asyncio.run(story())
