"""libvirt's Python binding: loaded only where libvirt is asked something, and its errors, which become ours."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from snaptree.errors import BusyError, NotFoundError, RefusedError, SnaptreeError, ToolError

SOCKETS = ("libvirt-sock", "virtqemud-sock")
"""What a libvirt daemon that could be asked listens on."""
_THIS_HOST = ("localhost", "127.0.0.1", "::1")


def binding() -> Any:
    """libvirt's Python binding.

    :raise ToolError: it is not installed.
    """
    try:
        import libvirt
    except ImportError as error:
        hint = "install snaptree[libvirt], or your distribution's python3-libvirt"
        raise ToolError("libvirt's Python binding is not installed", hint) from error
    # It would print every error, also those that are expected.
    libvirt.registerErrorHandler(lambda context, error: None, None)
    return libvirt


def chosen_uri(wanted: str | None = None) -> str | None:
    """The connection that the user has named, by option or by ``LIBVIRT_DEFAULT_URI``; ``None`` without."""
    return wanted or os.environ.get("LIBVIRT_DEFAULT_URI") or None


def usual_uri() -> str | None:
    """The connection to use where none was named: that of a daemon that runs; ``None`` where none does.

    Merely to find out whether there are domains, none is started.
    """
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    for folder, uri in (("/run/libvirt", "qemu:///system"), (os.path.join(own, "libvirt"), "qemu:///session")):
        if os.path.isabs(folder) and any(os.access(os.path.join(folder, each), os.W_OK) for each in SOCKETS):
            return uri
    return None


def is_here(uri: str) -> bool:
    """Whether a connection is to a daemon of this host, whatever leads there.

    Source: libvirt's "Connection URIs" (``uri.html``): without a host it is ``localhost``, but for a program of the
    user's (``ext``), of which nobody knows where it leads.
    """
    parts = urlsplit(uri)
    if not parts.netloc:
        return parts.scheme.partition("+")[2] != "ext"
    return parts.hostname in (*_THIS_HOST, socket.gethostname().lower())


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn what libvirt says into an error of ours.

    :param doing: what was to be done, for the message: ``cannot DOING``.
    """
    libvirt = binding()
    try:
        yield
    except libvirt.libvirtError as error:
        raise explain(libvirt, error, doing) from error


def explain(libvirt: Any, error: Any, doing: str) -> SnaptreeError:
    code, text = error.get_error_code(), " ".join(str(error.get_error_message() or error).split())
    said = f"cannot {doing}: {text}"
    if code in (libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED, libvirt.VIR_ERR_AUTH_UNAVAILABLE):
        return RefusedError(said, "use sudo, or join the group that may use libvirt")
    if code in (libvirt.VIR_ERR_ACCESS_DENIED, libvirt.VIR_ERR_OPERATION_DENIED):
        return RefusedError(said, "use sudo, or join the group that may use libvirt")
    if "Permission denied" in text:
        return RefusedError(said, "use sudo, or join the group that may use libvirt")
    if code in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT):
        return NotFoundError(said, "see 'virsh list --all'")
    if code in (libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_BLOCK_COPY_ACTIVE):
        return BusyError(said, "see 'virsh domjobinfo', and try again")
    if "due to previous migration" in text:
        return RefusedError(said, "its memory has been saved while it stood still: let it run for a moment first")
    if code == libvirt.VIR_ERR_OPERATION_INVALID and "job" in text:
        return BusyError(said, "see 'virsh domjobinfo', and try again")
    if code in (libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN):
        return ToolError(said, "is the name right? 'virsh -c URI list' tells")
    if code in (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_INTERNAL_ERROR):
        return ToolError(said, "is libvirtd running? see 'systemctl status libvirtd' and its log")
    return ToolError(said, "see the log of libvirtd")
