"""What stands between snaptree and the monitor of a QEMU that runs, and answers nonsense for it, once.

QEMU is real, has done what it was told, and goes on: only what snaptree hears of it is not what it said.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.kit.strange_daemon import nonsense

AT_MOST = 16
"""So many descriptors may come with one message."""


class StrangeMonitor:
    """What listens in the place of a monitor, until :meth:`close`.

    :param place: the monitor's socket.
    :param way: in which way it is strange, as :func:`nonsense` has them.
    :param number: to which command, counted over all sessions from 1; 0 for none.
    """

    def __init__(self, place: Path, way: str = "", number: int = 0) -> None:
        self.place, self.real = place, place.with_name(f"{place.name}.real")
        self.way, self.number = way, number
        self.said: list[str] = []
        """The commands that were said so far."""
        self.came = False
        place.rename(self.real)
        self._listens = socket.socket(socket.AF_UNIX)
        self._listens.bind(str(place))
        self._listens.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """The monitor is itself again for whoever comes."""
        self._listens.shutdown(socket.SHUT_RDWR)
        self._listens.close()
        if self.real.exists():
            self.real.rename(self.place)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listens.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as qemu:
            try:
                qemu.connect(str(self.real))
            except OSError:
                return
            wrong: list[Any] = []
            answers = threading.Thread(target=self._answers, args=[qemu, client, wrong], daemon=True)
            answers.start()
            with contextlib.suppress(OSError):
                for text, descriptors in received(client):
                    command = json.loads(text)
                    self.said.append(command["execute"])
                    if len(self.said) == self.number:
                        wrong.append(command.get("id"))
                    socket.send_fds(qemu, [text], descriptors)
                    for each in descriptors:
                        os.close(each)
            with contextlib.suppress(OSError):
                qemu.shutdown(socket.SHUT_RDWR)
            answers.join()

    def _answers(self, qemu: socket.socket, client: socket.socket, wrong: list[Any]) -> None:
        with contextlib.suppress(OSError), qemu.makefile("rb") as lines:
            for line in lines:
                said = line
                # What ends the negotiation has no name.
                answer = json.loads(line)
                if wrong and "event" not in answer and answer.get("id") == wrong[-1]:
                    instead = nonsense(self.way, wrong.pop())
                    assert instead is not None, self.way
                    said, self.came = instead, True
                client.sendall(said)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def received(client: socket.socket) -> Iterator[tuple[bytes, list[int]]]:
    """The commands that come, and the descriptors with them; nothing stands between the commands."""
    text, decoder, descriptors = "", json.JSONDecoder(), list[int]()
    while True:
        data, more, _, _ = socket.recv_fds(client, 65536, AT_MOST)
        if not data:
            return
        text, descriptors = text + data.decode(), descriptors + more
        while text:
            try:
                _, end = decoder.raw_decode(text)
            except ValueError:
                break
            yield text[:end].encode(), descriptors
            text, descriptors = text[end:].lstrip(), []
