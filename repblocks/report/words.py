"""How sizes are written."""

from collections.abc import Iterable

_TIMES = "\u00d7"


def size(sides: Iterable[int]) -> str:
    """Numbers with the sign of multiplication between them: the size of a kernel or of an image."""
    return _TIMES.join(map(str, sides))
