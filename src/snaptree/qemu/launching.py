"""Starting QEMU from a command line that a user has stored."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from snaptree.errors import RefusedError, ToolError, UsageError
from snaptree.images import child, durable, gate, qemu_img
from snaptree.images.qemu_img import NO_KEYS, Keys
from snaptree.model.layer import LayerId
from snaptree.planning.launch import split_command
from snaptree.qemu import dialling
from snaptree.qemu.options import OWN
from snaptree.qemu.running import RunningQemu

Chain = Sequence[tuple[LayerId, str, str]]
"""The layers of a disk, ``(id, path, format)``, the tip first."""

START_SECONDS = 60.0
"""So long QEMU may take until it listens, and until it has loaded what it is to load without any progress."""
LOG_BYTES = 4000


def node_name(layer: LayerId, token: str) -> str:
    """The name of a layer's node. QEMU takes 31 characters; the token keeps apart what has had the number before."""
    return f"st{layer}-{token[:12]}"


def is_ours(node: str) -> bool:
    """Whether a node has a name that snaptree gives: of a layer, of an overlay, or of what a merge has put in place."""
    return OWN.match(node) is not None


def command_line(
    command: str, disks: Mapping[str, Chain], token: str, keys: Keys = NO_KEYS, *, loads: bool = False
) -> list[str]:
    """QEMU's command line: the stored one, with the disks filled in.

    ``{vda}`` stands for the node of the disk ``vda``, to be given to a device (``drive={vda}``). Where no disk has a
    place in the command each gets a ``virtio-blk-pci`` device.

    :param keys: the files with the keys of encrypted layers.
    :param loads: it is to be told by its monitor what memory to load, and to wait afterwards.
    :raise UsageError: only some of the disks have a place in the command, or it names one that there is not.
    :raise RefusedError: it opens an image of the machine itself, or a layer's key is not known.
    """
    words = split_command(command)
    if loads:
        words = [*_without_incoming(words), "-incoming", "defer", "-S"]
    tips = {disk: node_name(chain[0][0], token) for disk, chain in disks.items()}
    used = {disk for disk in disks for word in words if f"{{{disk}}}" in word}
    _require_no_image(words, disks)
    for word in words:
        unknown = [name for name in re.findall(r"drive=\{([a-z0-9_-]+)\}", word) if name not in disks]
        if unknown:
            raise UsageError(f"the start command has a place for {unknown[0]}, which the machine has not", "attach it")
    if used and used != set(disks):
        missing = sorted(set(disks) - used)[0]
        raise UsageError(
            f"the start command has no place for disk {missing}",
            f"give it a device with drive={{{missing}}}, or leave out all places",
        )
    for disk, node in tips.items():
        words = [word.replace(f"{{{disk}}}", node) for word in words]
    opened: list[dict[str, Any]] = []
    for chain in disks.values():
        below: str | None = None
        for layer, path, image_format in reversed(chain):
            node = node_name(layer, token)
            opened.append(gate.blockdev(path, image_format, node, below, read_only=layer != chain[0][0]))
            below = node
    found = [*qemu_img.key_words(keys, *opened), *(word for each in opened for word in ("-blockdev", json.dumps(each)))]
    for disk in disks if not used else ():
        found += ["-device", f"virtio-blk-pci,drive={tips[disk]},id={disk}"]
    # At the end, whatever runs QEMU for the user (nice, taskset).
    return [*words, *found]


def _without_incoming(words: Sequence[str]) -> list[str]:
    """The command without what it would load by itself."""
    found: list[str] = []
    passed = False
    for word in words:
        if not passed and word not in ("-incoming", "--incoming"):
            found.append(word)
        passed = not passed and word in ("-incoming", "--incoming")
    return found


def _require_no_image(words: Sequence[str], disks: Mapping[str, Chain]) -> None:
    for disk, chain in disks.items():
        for _, path, _ in chain:
            if any(re.search(rf"(^|[=,:\"]){re.escape(path)}($|[,\"])", word) for word in words):
                raise RefusedError(
                    f"the start command opens {path} itself, which belongs to disk {disk}",
                    f"leave the disk to snaptree: use drive={{{disk}}} in a -device, or nothing at all",
                )


async def launch(words: Sequence[str], monitor: str, folder: str, log: str, *, loads: bool = False) -> RunningQemu:
    """Start QEMU, and connect to its monitor when it is ready: whatever it has to load has been loaded.

    It lives on without us. What it says goes into ``log``.

    :param loads: it is ready when it can be told what to load.
    :param folder: the folder that it is to work in.
    :raise ToolError: it is not installed, ended at once, or does not answer.
    """
    program = child.find_tool(words[0]) if "/" not in words[0] else words[0]
    bound = dialling.bind(monitor)
    try:
        number = bound.fileno()
        more = ["-chardev", f"socket,id=snaptree-monitor,fd={number},server=on,wait=off"]
        more += ["-mon", "chardev=snaptree-monitor,mode=control"]
        writing = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            process = subprocess.Popen(
                [program, *words[1:], *more],
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                cwd=folder,
                pass_fds=(number,),
                start_new_session=True,
            )
        except OSError as error:
            raise ToolError(f"cannot start {words[0]}: {error.strerror}", "see to the start command") from error
        finally:
            os.close(writing)
    finally:
        bound.close()
    try:
        return await _ready(process, monitor, log, loads=loads)
    except BaseException:
        child.kill(process, os.path.basename(words[0]))
        durable.remove_small(monitor)
        raise


async def _ready(process: subprocess.Popen[bytes], monitor: str, log: str, *, loads: bool) -> RunningQemu:
    deadline = time.monotonic() + START_SECONDS
    qemu: RunningQemu | None = None
    try:
        while qemu is None:
            _require_alive(process, log)
            qemu = await RunningQemu.attach(monitor)
            if qemu is None and time.monotonic() > deadline:
                raise ToolError(f"QEMU does not listen on its monitor after {START_SECONDS:.0f} s", words_of(log))
            await asyncio.sleep(0.01)
        seen = -1
        while not loads and await qemu.run_state() == "inmigrate":
            now = await _loaded(qemu)
            if now != seen:
                seen, deadline = now, time.monotonic() + START_SECONDS
            if time.monotonic() > deadline:
                raise ToolError(f"QEMU has loaded nothing for {START_SECONDS:.0f} s", words_of(log))
            await asyncio.sleep(0.01)
    except BaseException as error:
        if qemu is not None:
            await qemu.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5 if isinstance(error, ToolError) else 0.0)
            _require_alive(process, log)
        raise
    # It is not ours to wait for any more.
    process.returncode = 0
    return qemu


async def _loaded(qemu: RunningQemu) -> int:
    """A number that grows while QEMU loads a machine's memory."""
    with suppress(OSError, ValueError):
        with open(f"/proc/{qemu.pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def _require_alive(process: subprocess.Popen[bytes], log: str) -> None:
    if process.poll() is not None:
        said = words_of(log)
        raise ToolError(f"QEMU ended with {process.returncode} when it was started" + (f": {said}" if said else ""))


def words_of(log: str) -> str:
    """The end of what QEMU has said."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
            return " ".join(file.read().decode(errors="replace").split())
    except OSError:
        return ""
