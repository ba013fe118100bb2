"""Copies of models that may hold more than modules, parameters and buffers."""

import copy

from torch import nn

from repblocks.blocks.copying import calculated_attributes
from repblocks.errors import ConfigurationError


def duplicate(model: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """A deep copy. What hooks have calculated and left as attributes is copied as plain tensors.

    Args:
        model: Is not changed.
        memo: Objects by id that take the place of copies, as for ``copy.deepcopy``.

    Raises:
        ConfigurationError: Something in the model cannot be copied.
    """
    calculated = {id(tensor): tensor.detach().clone() for tensor in calculated_attributes(model)}
    try:
        return copy.deepcopy(model, {**calculated, **(memo or {})})
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ConfigurationError(
            f"{type(model).__name__} cannot be copied ({error}); give it a __deepcopy__, or take what cannot be copied "
            "out of its attributes"
        ) from error
