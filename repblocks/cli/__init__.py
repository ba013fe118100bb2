"""The command line: ``repblocks --help``, or ``python -m repblocks --help``."""

from repblocks.cli.app import main

__all__ = ["main"]
