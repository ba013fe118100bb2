"""Linear blocks by short name, for models, configs and whoever compares them."""

import difflib
from collections.abc import Callable
from typing import TypeVar

from repblocks.blocks.base import RepConv
from repblocks.errors import ConfigurationError

BLOCKS: dict[str, type[RepConv]] = {}
SomeBlock = TypeVar("SomeBlock", bound=type[RepConv])


def register_block(name: str) -> Callable[[SomeBlock], SomeBlock]:
    """Decorate a `RepConv` with arguments ``(in_channels, out_channels, kernel_size, *, **Geometry)``.

    Raises:
        ConfigurationError: The name is taken by another class.
    """

    def remember(block: SomeBlock) -> SomeBlock:
        if BLOCKS.setdefault(name, block) is not block:
            raise ConfigurationError(f"block {name!r} is registered already, as {BLOCKS[name].__name__}")
        return block

    return remember


def resolve_block(name: str) -> Callable[..., RepConv]:
    """The class of a short name.

    Raises:
        ConfigurationError: No block has that name.
    """
    if name not in BLOCKS:
        near = difflib.get_close_matches(name, BLOCKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(f"no block is named {name!r}{hint} (blocks: {', '.join(sorted(BLOCKS))})")
    return BLOCKS[name]
