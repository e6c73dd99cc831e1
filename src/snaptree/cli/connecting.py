"""``--connect``: the connection to libvirt. It may stand before the command or after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from snaptree.machines.connection import Connection

_URI = "snaptree.connect"


def _keep(context: click.Context, parameter: click.Parameter, uri: str | None) -> None:
    if uri is not None:
        context.meta[_URI] = uri


connect_option = click.option(
    "--connect",
    metavar="URI",
    expose_value=False,
    callback=_keep,
    is_eager=True,
    help="The connection to libvirt, such as qemu:///session; by default LIBVIRT_DEFAULT_URI, or qemu:///system.",
)


def connection() -> Connection:
    """The door to all machines, with libvirt by the connection that the user has named."""
    from snaptree.machines.connection import Connection

    context = click.get_current_context(silent=True)
    return Connection(uri=context.meta.get(_URI) if context is not None else None)
