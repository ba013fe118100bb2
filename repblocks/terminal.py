"""What all commands say in the same way."""

import sys

from rich.console import Console
from rich.panel import Panel
from rich.text import Text


def show_error(error: Exception, said: str | None = None) -> None:
    """Show an error that tells users what to do as one block, on stderr.

    Args:
        error: Its class is the title.
        said: What to show in the place of its message.
    """
    block = Panel(Text(said or str(error)), title=type(error).__name__, border_style="red", title_align="left")
    Console(stderr=True, file=sys.stderr).print(block)
