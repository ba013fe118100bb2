"""How long work says how far it is, to whoever wants to know."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""``track(items, what)`` gives the items again, one by one; it may show a bar, as ``rich.progress.track`` does."""


def untracked(items: Sequence[Any], what: str) -> Iterable[Any]:
    """Show nothing."""
    return items
