"""Linear blocks by short name, for models, configs and whoever compares them."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from repblocks.blocks.base import RepConv
from repblocks.errors import ConfigurationError
from repblocks.names import known_name

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
    return BLOCKS[known_name("block", name, BLOCKS)]


def options_of(name: str, **options: Any) -> dict[str, Any]:
    """Those of the options that the block of a short name takes; what is said of branches it lacks is left out.

    Raises:
        ConfigurationError: No block has that name.
    """
    arguments = inspect.signature(resolve_block(name)).parameters
    return {option: value for option, value in options.items() if option in arguments}
