"""The commands, and how each of them ends."""

import os
import sys
from collections.abc import Sequence

import typer
from rich.console import Console

from repblocks.cli import deploying, measuring, models, running
from repblocks.errors import RepblocksError
from repblocks.terminal import show_error

FULL_ERROR = "REPBLOCKS_FULL_ERROR"
"""Set in the environment, it makes commands show tracebacks."""

app = typer.Typer(
    name="repblocks",
    help="Train networks with parallel branches, collapse them exactly, and ship the plain networks they equal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for commands in (models, running, deploying, measuring):
    commands.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: with 0 on success only, with one readable block for an error.

    Args:
        arguments: Those of the process by default.

    Raises:
        SystemExit: 0; 1 after an error, 2 after a wrong option, 130 after Ctrl-C. ``REPBLOCKS_FULL_ERROR=1`` shows
            tracebacks instead of blocks.
    """
    try:
        app(args=None if arguments is None else list(arguments), standalone_mode=True)
    except Exception as error:  # whatever it is, users of a command get it in one block
        if os.environ.get(FULL_ERROR):
            raise
        hint = "" if isinstance(error, RepblocksError | OSError) else f"\n\n{FULL_ERROR}=1 shows where it came from"
        show_error(error, f"{error}{hint}")
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)
