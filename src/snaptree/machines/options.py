"""What a user says of a machine that is to be looked after."""

from __future__ import annotations

from msgspec import Struct


class DiskOption(Struct, frozen=True):
    """One ``--disk [TARGET=]PATH[,format=F]``; the path is absolute."""

    target: str
    path: str
    format: str | None = None


class AddOptions(Struct, frozen=True):
    """The options of ``snaptree add``; paths are absolute. ``from_xml`` is a folder of libvirt's domainsnapshot XML.

    ``start`` is run in ``folder``, and ``keys`` are files with keys of encrypted layers.
    """

    name: str
    disks: tuple[DiskOption, ...]
    bases: tuple[str, ...] = ()
    nvram: str | None = None
    tpm: str | None = None
    qmp: str | None = None
    start: str | None = None
    folder: str | None = None
    adopt: bool = False
    from_xml: str | None = None
    agent: str | None = None
    keys: tuple[str, ...] = ()
