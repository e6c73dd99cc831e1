"""What a QEMU is like: all that must be the same in the one that loads its memory.

QEMU itself refuses another machine type or size; another processor model or one device more it takes without a word,
and what runs then is broken (10.0.2). Names of nodes and devices, iothreads and image files are free.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from snaptree.errors import SnaptreeError
from snaptree.model.memory import SLEEPING, Saveable
from snaptree.qemu import memory
from snaptree.qemu.running import RunningQemu
from snaptree.qemu.session import QmpSession, properties, sense

_SHELVES = ("/machine/peripheral", "/machine/peripheral-anon")
_ASPECTS = (
    "addr",
    "num-queues",
    "vectors",
    "queue-size",
    "multifunction",
    "chassis",
    "slot",
    "mq",
    "bus",
    "port",
    "nr",
)
"""Properties of devices that a guest sees, so far as a device has them."""


async def describe(qemu: RunningQemu) -> dict[str, str]:
    """What the machine is like, by a word for each aspect.

    :raise ToolError: an answer makes no sense.
    """
    qmp = qemu.qmp
    size = await qmp.execute("query-memory-size-summary")
    backends = await qmp.execute("query-memdev")
    processors = await qmp.execute("query-cpus-fast")
    target = await qmp.execute("query-target")
    with sense(qmp.name, "description of its machine", [size, backends, processors, target]):
        first = str(processors[0]["qom-path"])
        found = {
            "architecture": str(target["arch"]),
            "RAM": f"{int(size['base-memory']) + int(size.get('plugged-memory', 0))} bytes",
            "memory backends": ", ".join(sorted(f"{each.get('id', '')} {each['size']}" for each in backends)),
            "processors": json.dumps([each["props"] for each in processors], sort_keys=True),
        }
    found["machine type"] = str(await qmp.execute("qom-get", path="/machine", property="type"))
    found["processor model"] = str(await qmp.execute("qom-get", path=first, property="type"))
    with suppress(SnaptreeError):
        words = await qmp.execute("qom-get", path=first, property="feature-words")
        with sense(qmp.name, "features of its processor", words):
            text = json.dumps(sorted(json.dumps(each, sort_keys=True) for each in words))
        found["processor features"] = hashlib.sha256(text.encode()).hexdigest()
    with suppress(SnaptreeError):
        accelerator = await qmp.execute("query-kvm")
        with sense(qmp.name, "accelerator", accelerator):
            found["accelerator"] = "kvm" if accelerator["enabled"] else "other"
    found["devices"] = "; ".join(await _devices(qmp))
    return found


async def _devices(qmp: QmpSession) -> list[str]:
    """Every device that was asked for, with where it is and what a guest sees of it; sorted."""
    found: dict[str, dict[str, str]] = {}
    for shelf in _SHELVES:
        for child, kind in await properties(qmp, shelf):
            if not kind.startswith("child<"):
                continue
            path = f"{shelf}/{child}"
            aspects = {"type": kind[6:-1]}
            has = {name for name, _ in await properties(qmp, path)}
            for name in (*_ASPECTS, "parent_bus"):
                if name in has:
                    with suppress(SnaptreeError):
                        aspects[name] = str(await qmp.execute("qom-get", path=path, property=name))
            found[path] = aspects
    return sorted(_told(found, path) for path in found)


def _told(devices: Mapping[str, Mapping[str, str]], path: str) -> str:
    """A device in a line; the bus is told by the device that has it, whatever that is called."""
    aspects = dict(devices[path])
    bus = aspects.pop("parent_bus", "")
    kind = aspects.pop("type")
    for other in devices:
        if bus.startswith(other + "/") and other != path:
            bus = f"[{_told(devices, other)}]{bus.removeprefix(other).rpartition('/')[0]}"
    return " ".join([kind, *(f"{name}={value}" for name, value in sorted(aspects.items())), f"on {bus}" if bus else ""])


async def saveable(qemu: RunningQemu) -> Saveable:
    """What its monitor says of a running machine's memory."""
    needs = await describe(qemu)
    state: Any = await qemu.qmp.execute("query-migrate")
    reasons = list(state.get("blocked-reasons", [])) if isinstance(state, dict) else []
    doing = await qemu.run_state()
    forms = memory.allowed(doing, memory.forms_known(await memory.settings(qemu.qmp)))
    if not forms:
        reasons.append(memory.obstacle(doing))
    ram = int(needs["RAM"].split()[0])
    used = min(ram, _resident(qemu.pid, ram))
    return Saveable(ram, used, needs, forms, "; ".join(map(str, reasons)), asleep=doing == SLEEPING)


def _resident(pid: int, otherwise: int) -> int:
    """How much memory the process has touched, in bytes: so much of a machine's memory has to be saved at the most."""
    found = 0
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name in ("VmRSS", "VmSwap", "HugetlbPages"):
                    found += int(value.split()[0]) << 10
    except (OSError, ValueError, IndexError):
        return otherwise
    return found or otherwise
