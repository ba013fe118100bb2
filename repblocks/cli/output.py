"""What a command prints: a table for people, or JSON for programs."""

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track
from rich.table import Table

Item = TypeVar("Item")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in the place of text.")]
"""The option that every command has."""


def show(result: Any, text: Callable[[], Any], *, as_json: bool) -> None:
    """Print a result.

    Args:
        result: Plain values.
        text: Makes what rich prints.
        as_json: Whether to print JSON.
    """
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console, shown = Console(), text()
    if isinstance(shown, str):
        console.print(shown, highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(shown, highlight=False)


def progress(items: Sequence[Item], what: str, *, as_json: bool) -> Iterable[Item]:
    """Go through items with a bar on stderr, where somebody looks at it."""
    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=as_json or not console.is_terminal)


@contextmanager
def working(what: str, *, as_json: bool) -> Generator[None]:
    """Show on stderr, where somebody looks at it, that something is going on whose length nobody knows."""
    console = Console(stderr=True)
    hidden = as_json or not console.is_terminal
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        bar.add_task(what, total=None)
        yield


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table whose first column is text and whose others are aligned to the right."""
    made = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        made.add_row(*(str(value) for value in row))
    return made


def pairs(values: Mapping[str, Any]) -> Table:
    """Names and values in two columns."""
    made = Table(show_header=False, box=None)
    for name, value in values.items():
        made.add_row(name, str(value))
    return made
