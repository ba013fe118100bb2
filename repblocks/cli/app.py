"""The commands, and how each of them ends."""

import os
import sys
from collections.abc import Sequence

import typer
from rich.console import Console

from repblocks.cli import deploying, measuring, models, running
from repblocks.errors import RepblocksError
from repblocks.terminal import show_error

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
    """Run a command and exit: with 0 on success only, with one readable block for errors raised on purpose.

    Args:
        arguments: Those of the process by default.

    Raises:
        SystemExit: 0; 1 after an error, 2 after a wrong option, 130 after Ctrl-C. ``REPBLOCKS_FULL_ERROR=1`` shows
            tracebacks instead of blocks.
    """
    try:
        app(args=None if arguments is None else list(arguments), standalone_mode=True)
    except RepblocksError as error:
        if os.environ.get("REPBLOCKS_FULL_ERROR"):
            raise
        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)
