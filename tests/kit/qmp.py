"""A QMP client of the tests' own, so that what snaptree's says can be checked."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any


class Qmp:
    """One monitor, until :meth:`close`. Events are passed over."""

    def __init__(self, path: Path | str, seconds: float = 20.0) -> None:
        until = time.monotonic() + seconds
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(seconds)
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                self._socket.close()
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        self._lines = self._socket.makefile("r", encoding="utf-8")
        assert "QMP" in json.loads(self._lines.readline())
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """The answer to a command; an underscore in an argument's name stands for a dash."""
        said = {"execute": command, "arguments": {key.replace("_", "-"): each for key, each in arguments.items()}}
        self._socket.sendall(json.dumps(said).encode() + b"\n")
        while True:
            line = self._lines.readline()
            assert line, f"QEMU went away during {command}"
            answer = json.loads(line)
            if "error" in answer:
                raise AssertionError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
