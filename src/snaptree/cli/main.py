"""The ``snaptree`` command: finds the command that is meant and turns errors into messages and exit statuses."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any

import click

from snaptree import __version__
from snaptree.cli.connecting import connect_option
from snaptree.errors import IoError, SnaptreeError, UsageError

COMMANDS = {
    "add": "machines",
    "set": "machines",
    "disk": "machines",
    "remove": "machines",
    "list": "machines",
    "path": "machines",
    "tree": "looking",
    "show": "looking",
    "log": "looking",
    "branches": "looking",
    "snapshot": "snapshots",
    "delete": "snapshots",
    "revert": "snapshots",
    "branch": "branching",
    "switch": "branching",
    "rename": "branching",
    "squash": "upkeep",
    "verify": "upkeep",
    "recover": "upkeep",
    "gc": "upkeep",
    "start": "running",
    "stop": "running",
    "operations": "operations",
    "cancel": "operations",
    "pause": "operations",
    "resume": "operations",
    "limit": "operations",
}
"""Each command and the module that has it; a module is imported only when one of its commands is used."""


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        found = getattr(importlib.import_module(f"snaptree.cli.{module}"), f"{cmd_name}_command")
        assert isinstance(found, click.Command)
        return found


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
)
@connect_option
@click.version_option(__version__, prog_name="snaptree")
@click.pass_context
def cli(context: click.Context) -> None:
    """Snapshots of QEMU machines as a tree: take, go back, branch, and delete any of them in any order.

    Without a command it lists the machines.
    """
    if context.invoked_subcommand is None:
        from snaptree.cli.machines import list_command

        context.invoke(list_command, as_json=False)
        click.echo("'snaptree --help' says what can be done with them", err=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    # Loading NumPy starts a thread for each processor, for linear algebra that nobody asks for here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    status = run(arguments)
    database = sys.modules.get("snaptree.store.database")
    if database is not None:
        database.close_all()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Taking Python and NumPy apart again takes as long as a small merge.
    os._exit(status)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        result = cli.main(args=words, prog_name="snaptree", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except SnaptreeError as error:
        return _said(error, as_json="--json" in words)
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.ClickException as error:
        if "--json" in words:
            _say_as_json(UsageError(error.format_message(), "see it with --help"))
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("snaptree: stopped", err=True)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more at its own end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _said(
            IoError(f"cannot use{where}: {error.strerror or error}", "check the path"), as_json="--json" in words
        )
    except Exception as error:
        if _out_of_memory(error):
            return _said(
                IoError("there is not enough memory", "free some, or raise the limit on it"), as_json="--json" in words
            )
        if os.environ.get("SNAPTREE_DEBUG"):
            raise
        click.echo(f"snaptree: something unforeseen happened: {type(error).__name__}: {error}", err=True)
        click.echo("  hint: run it again with SNAPTREE_DEBUG=1 and report what it prints", err=True)
        return 1


def _out_of_memory(error: Exception) -> bool:
    """Whether there was no memory, perhaps to load a library."""
    words = ("cannot allocate memory", "failed to map segment", "cannot create shared object")
    return isinstance(error, MemoryError) or (
        isinstance(error, ImportError) and any(word in str(error).lower() for word in words)
    )


def _said(error: SnaptreeError, *, as_json: bool) -> int:
    """Tell the user of an error: a message for people on stderr, with ``--json`` also an object on stdout."""
    if as_json:
        _say_as_json(error)
    from snaptree.cli.output import say

    say(f"snaptree: {error.message}", err=True)
    if error.hint:
        say(f"  hint: {error.hint}", err=True)
    return error.status


def _say_as_json(error: SnaptreeError) -> None:
    import json

    fields: dict[str, Any] = {
        "code": error.code,
        "status": error.status,
        "message": error.message,
        "hint": error.hint,
    }
    click.echo(json.dumps({"error": fields}))
