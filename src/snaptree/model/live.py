"""A machine that runs, as a value: what was found out from its monitor."""

from __future__ import annotations

from dataclasses import dataclass

from snaptree.model.layer import LayerId

OFF, RUNNING, PAUSED, UNKNOWN = "off", "running", "paused", "unknown"


@dataclass(frozen=True, slots=True)
class Live:
    """The QEMU that has the active tips open.

    ``state`` is ``running`` or ``paused``. ``open`` are the layers that it has open, tips and all beneath them;
    of ``reopenable`` it is known how it has opened them, of ``tracked`` it keeps dirty bitmaps. ``commands`` is what
    its monitor can be asked for.
    """

    state: str
    pid: int
    open: frozenset[LayerId] = frozenset()
    commands: frozenset[str] = frozenset()
    reopenable: frozenset[LayerId] = frozenset()
    tracked: frozenset[LayerId] = frozenset()
