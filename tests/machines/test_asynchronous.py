"""The verbs for programs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import MiB

import snaptree
from snaptree.errors import CancelledError, NotFoundError
from snaptree.machines.asynchronous import Machine
from snaptree.machines.options import AddOptions, DiskOption


async def machine_in(folder: Path) -> Machine:
    path = images.create(folder / "web1.qcow2", 64 * MiB)
    images.io(path, "qcow2", "write -P 1 0 20M")
    async with snaptree.connect(str(folder / "state")) as machines:
        web1 = await machines.add(AddOptions("web1", (DiskOption("vda", str(path)),)))
        assert list(machines) == ["web1"]
        await web1.snapshot("s1", description="first")
        images.io((await web1.show())["disks"][0]["path"], "qcow2", "write -P 2 30M 20M")
        return web1


def test_verbs_are_awaited_and_progress_is_iterated_over(tmp_path: Path) -> None:
    async def story() -> None:
        web1 = await machine_in(tmp_path)
        seen = [(each.done, each.total) async for each in web1.delete("s1", merge="commit")]
        assert seen[-1][1] == 20 * MiB and max(done for done, _ in seen) == 20 * MiB
        shown = await web1.show()
        assert shown["snapshots"] == [] and len(shown["layers"]) == 1
        with pytest.raises(NotFoundError):
            await web1.revert("s1")
        with pytest.raises(NotFoundError):
            async for _ in web1.delete("s1"):
                pass

    asyncio.run(story())


def test_an_operation_is_cancelled_and_goes_on_later(tmp_path: Path) -> None:
    async def story() -> None:
        web1 = await machine_in(tmp_path)
        wanted = images.read((await web1.show())["disks"][0]["path"])
        operation = web1.delete("s1", merge="commit")
        with pytest.raises(CancelledError):
            async for progress in operation:
                if progress.total:
                    operation.cancel()
        assert images.read((await web1.show())["disks"][0]["path"]) == wanted
        plan = await web1.gc()
        assert plan.total_bytes
        assert images.read(tmp_path / "web1.qcow2") == wanted
        assert await web1.verify() == ()

    asyncio.run(story())
