"""Choosing by name, with near names in the error."""

from collections.abc import Iterable
from difflib import get_close_matches

from repblocks.errors import ConfigurationError


def known_name(setting: str, name: str, known: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``known``.

    Args:
        setting: What the user set, as written on the command line (``"optimizer.name"``).
        name: What they set it to.
        known: The names that exist.

    Raises:
        ConfigurationError: The name is unknown; the message lists near names, or some where none is near.
    """
    names = sorted(known)
    if name in names:
        return name
    near = get_close_matches(name, names, n=5, cutoff=0.5)
    hint = f"did you mean one of: {', '.join(near)}?" if near else f"there are {len(names)}: {_some(names)}"
    raise ConfigurationError(f"{setting}={name} is unknown; {hint}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
