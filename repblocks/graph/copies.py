"""Copies of models that may hold more than modules, parameters and buffers."""

import copy

from torch import Tensor, nn

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


def calculated_attributes(model: nn.Module) -> list[Tensor]:
    """Tensors among the attributes of the modules that are neither parameters nor buffers, and have a history."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    return [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
