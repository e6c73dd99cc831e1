"""Numbers of bytes for people."""

from __future__ import annotations


def readable(number: int) -> str:
    """A number of bytes for people: ``1.2 GiB``."""
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{number} B" if unit == "B" else f"{value:.1f} {unit}"
