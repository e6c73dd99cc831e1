"""Snapshots of QEMU machines as a tree."""

__version__ = "0.1.0"
