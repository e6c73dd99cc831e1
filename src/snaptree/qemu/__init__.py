"""QEMU's programs over QMP."""
