"""A stand-in for qemu-storage-daemon: the real one behind a monitor that at some command becomes strange.

``STRANGE_WAY`` says how, ``STRANGE_AT`` at which command (its first time; ``start`` for before the greeting), and
``STRANGE_REAL`` where the real program is. It writes the ids of its processes into the file ``STRANGE_TOLD``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

WAY, AT, REAL, TOLD = (os.environ.get(f"STRANGE_{name}", "") for name in ("WAY", "AT", "REAL", "TOLD"))
EVENT = b'{"timestamp":{"seconds":1,"microseconds":1},"event":"JOB_STATUS_CHANGE","data":{"status":"null","id":"x"}}\n'
STARTS = ("block-commit", "block-stream")


def nonsense(way: str, number: Any) -> bytes | None:
    """What is said instead of the answer to the command of that number; ``None`` for what is strange otherwise."""
    lines = {
        "no JSON": b"what?\n",
        "an array": b"[]\n",
        "nested": b"[" * 100_000 + b"\n",
        "binary": b"\xff\x00\xfe\n",
        "no end of line": b"x" * (11 << 20),
        "a huge answer": json.dumps({"return": "x" * (9 << 20), "id": number}).encode() + b"\n",
        "another id": b'{"return":{},"id":"another"}\n',
        "no id": b'{"return":{}}\n',
        "an error without id": b'{"error":{"class":"GenericError","desc":"no"}}\n',
        "an id that is a list": b'{"return":{},"id":[]}\n',
        "no answer in it": json.dumps({"id": number}).encode() + b"\n",
        "an error that is a number": json.dumps({"error": 5, "id": number}).encode() + b"\n",
        "an event that is none": b'{"event":5}\n',
    }
    return lines.get(way)


def told(process: int) -> None:
    with open(TOLD, "a", encoding="ascii") as file:
        file.write(f"{process}\n")


def forever() -> None:
    while True:
        time.sleep(1000)


class Strange:
    """The connection to snaptree, and the one to the real daemon."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        ours, theirs = socket.socketpair()
        theirs.set_inheritable(True)
        self.process = subprocess.Popen(
            [REAL, "--chardev", f"socket,id=m,fd={theirs.fileno()}", "--monitor", "chardev=m"],
            close_fds=False,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),
        )
        theirs.close()
        told(self.process.pid)
        self.daemon = ours.makefile("rwb")
        self.began = False
        self.jobs: list[str] = []

    def say(self, *lines: bytes) -> None:
        for line in lines:
            self.client.sendall(line)

    def answer(self, number: Any, value: Any) -> None:
        self.say(json.dumps({"return": value, "id": number}).encode() + b"\n")

    def asked(self, line: bytes) -> bytes:
        """What the real daemon answers; its events go on to snaptree."""
        self.daemon.write(line)
        self.daemon.flush()
        while True:
            said = self.daemon.readline()
            if not said:
                sys.exit(0)
            if b'"event"' not in said[:200]:
                return said
            self.say(said)

    def commands(self) -> Iterator[dict[str, Any]]:
        """What snaptree sends; nothing stands between the commands."""
        text, decoder = "", json.JSONDecoder()
        while data := self.client.recv(65536):
            text += data.decode()
            while text:
                try:
                    command, end = decoder.raw_decode(text)
                except ValueError:
                    break
                text = text[end:].lstrip()
                yield command

    def run(self) -> None:
        self.say(self.daemon.readline())
        for command in self.commands():
            name, number = command["execute"], command.get("id")
            self.began = self.began or name == AT
            if not self.began or not self.strange(name, number, command):
                said = self.asked(json.dumps(command).encode())
                self.say(said)
                if self.began and WAY == "answers twice":
                    self.say(said)
        sys.exit(self.process.wait())

    def strange(self, name: str, number: Any, command: dict[str, Any]) -> bool:
        """Whether the command has been dealt with; some ways are strange about jobs only."""
        errors = {"refuses everything": "no", "is out of room": "No space left on device"}
        values: dict[str, Any] = {
            "a number": 5,
            "a text": "x",
            "nothing": None,
            "numbers": [5],
            "an empty job": [{}],
            "a job of odd types": [{"id": [], "status": 7, "current-progress": "x", "total-progress": None}],
        }
        if (said := nonsense(WAY, number)) is not None:
            self.say(said)
            return True
        if WAY in errors:
            fields = {"error": {"class": "GenericError", "desc": errors[WAY]}, "id": number}
            self.say(json.dumps(fields).encode() + b"\n")
            return True
        if WAY in values:
            self.answer(number, values[WAY])
            return True
        return self.strange_jobs(name, number, command) or self.strange_end()

    def strange_jobs(self, name: str, number: Any, command: dict[str, Any]) -> bool:
        states: dict[str, Any] = {
            "job stands still": ("running", 3, 10),
            "job in an unknown state": ("dreaming", 3, 10),
            "job beyond all numbers": ("running", 10**400, 10**400),
            "job that never completes": ("ready", 10, 10),
            "job that is never dismissed": ("aborting", 10, 10),
            "job that lies": ("concluded", 10, 10),
        }
        if name in STARTS:
            self.jobs.append(command["arguments"]["job-id"])
        if WAY == "job vanishes" and name == "query-jobs":
            self.answer(number, [])
            return True
        if WAY == "job that lies" and name in (*STARTS, "job-dismiss"):
            if name == "job-dismiss":
                self.jobs.remove(command["arguments"]["id"])
            self.answer(number, {})
            return True
        if WAY in states and name == "query-jobs":
            status, current, total = states[WAY]
            fields = {"type": "commit", "status": status, "current-progress": current, "total-progress": total}
            self.answer(number, [{"id": each, **fields} for each in self.jobs or ["x"]])
            return True
        return False

    def strange_end(self) -> bool:
        if WAY == "closes":
            self.client.shutdown(socket.SHUT_RDWR)
            self.client.close()
            forever()
        elif WAY == "stalls":
            forever()
        elif WAY == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif WAY == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif WAY == "ends":
            sys.exit(0)
        elif WAY == "dies but leaves the line open":
            if os.fork():
                os._exit(1)
            told(os.getpid())
            forever()
        elif WAY == "many events":
            self.say(EVENT * 20_000)
        elif WAY == "events without end":
            while True:
                self.say(EVENT * 1000)
        return False


def main() -> None:
    assert WAY and AT and REAL and TOLD
    told(os.getpid())
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    words = " ".join(sys.argv)
    client = socket.socket(fileno=int(words.partition("fd=")[2].split()[0].split(",")[0]))
    client.set_inheritable(False)
    greetings = {
        "greets with nonsense": b"hello\n",
        "greets with a number": b'{"QMP":5}\n',
        "greets without end": b"x" * (11 << 20),
        "greets, and is silent": b'{"QMP":{"version":{"qemu":{"micro":2,"minor":0,"major":10},"package":""},'
        b'"capabilities":[]}}\n',
    }
    if AT == "start":
        if WAY in greetings:
            client.sendall(greetings[WAY])
        elif WAY == "ends":
            sys.exit(1)
        forever()
    Strange(client).run()


if __name__ == "__main__":
    main()
