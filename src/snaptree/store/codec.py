"""Steps, deltas and their parts as JSON, and back: what the journal keeps of a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from msgspec import Struct

from snaptree.errors import StateError
from snaptree.model.branch import Branch
from snaptree.model.delta import Delta
from snaptree.model.layer import Identity, Layer, Point
from snaptree.model.machine import Due, MachineConfig
from snaptree.model.memory import Memory
from snaptree.model.snapshot import FirmwareFile, Snapshot
from snaptree.planning.domain_steps import Over
from snaptree.planning.live_steps import Cut, Kept, LiveJob, Mark, Swap
from snaptree.planning.memory_steps import Load, Save
from snaptree.planning.steps import STEPS, MoveJob, Step

_CLASSES: dict[str, type[Struct]] = {
    cls.__name__: cls
    for cls in (
        Branch,
        Cut,
        Delta,
        Due,
        FirmwareFile,
        Identity,
        Kept,
        Layer,
        LiveJob,
        Load,
        MachineConfig,
        Mark,
        Memory,
        MoveJob,
        Over,
        Point,
        Save,
        Snapshot,
        Swap,
        *STEPS,
    )
}


def _plain(value: Any) -> Any:
    if isinstance(value, Struct):
        fields = {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
        return {"!": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {"!": "map", "items": [[key, _plain(each)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _rich(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_rich(each) for each in value)
    if isinstance(value, dict):
        name = value["!"]
        if name == "map":
            return {key: _rich(each) for key, each in value["items"]}
        cls = _CLASSES[name]
        known = cls.__struct_fields__
        return cls(**{key: _rich(each) for key, each in value.items() if key in known})
    return value


def dump(value: Any) -> str:
    """The value (a step, or any noun that steps hold) as JSON text.

    File names that are not UTF-8 survive: ``ensure_ascii`` keeps their surrogate escapes.
    """
    return json.dumps(_plain(value), separators=(",", ":"))


def load(text: str) -> Any:
    """The value that :func:`dump` wrote.

    :raise StateError: the text is not of this form.
    """
    try:
        return _rich(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"an entry of the journal cannot be read: {error}", "was it written by another version?"
        ) from error


def load_steps(text: str) -> tuple[Step, ...]:
    """The steps of a plan."""
    return cast("tuple[Step, ...]", load(text))
