"""The layers of a model that int8 concerns, and what they read and give on images."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from repblocks.blocks.base import deployed
from repblocks.errors import ConfigurationError
from repblocks.fusion import AffineConv
from repblocks.fusion.faithful import is_faithful
from repblocks.quantization.rounding import rounded_by_channel

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def deploy_copy(model: nn.Module) -> nn.Module:
    """The deploy form as a copy on the CPU in eval mode; half precision becomes float32."""
    copied = deployed(model).cpu()
    return copied if _dtype(copied) == torch.float64 else copied.float()


def like_model(model: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """The batches in the dtype of a model."""
    return [batch.to(_dtype(model)) for batch in batches]


def _dtype(model: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)


def require_float32(model: nn.Module) -> None:
    """Check that ONNX Runtime's quantizer takes the weights.

    Raises:
        ConfigurationError: It does not.
    """
    others = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if others:
        raise ConfigurationError(f"got a model with weights in {others.pop()}; needed float32: quantize model.float()")


def weighted_layers(model: nn.Module) -> dict[str, Layer]:
    """The convolutions and linear layers by name, but for those whose weights or code are not just their own."""
    found: dict[str, Layer] = {}
    for name, module in model.named_modules():
        base = next((cls for cls in LAYERS if isinstance(module, cls)), None)
        if base is not None and is_faithful(module, base) and not parametrize.is_parametrized(module):
            found[name] = module  # pyright: ignore[reportArgumentType]  # an instance of LAYERS, as just asked
    return found


@torch.no_grad()
def watch(model: nn.Module, batches: Iterable[Tensor], see: Mapping[str, Callable[[Tensor, Tensor], None]]) -> None:
    """Run the model on the batches, and show each named layer's input and output to its function, call by call."""
    with ExitStack() as hooks:
        for name, function in see.items():
            layer = model.get_submodule(name)
            hooks.callback(layer.register_forward_hook(_shows(function), with_kwargs=True).remove)
        for batch in batches:
            model(batch)


def _shows(function: Callable[[Tensor, Tensor], None]) -> Callable[..., None]:
    return lambda _, args, kwargs, output: function(args[0] if args else kwargs["input"], output)


def with_weight(layer: Layer, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What the layer would compute with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return partial(F.linear, weight=weight)
    return replace(AffineConv.from_module(layer), weight=weight, bias=None)


def by_channel(layer: Layer, output: Tensor) -> Tensor:
    """``[out_channels, positions]`` of what a layer gave."""
    channels = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim  # from the end: no batch axis is needed
    return output.movedim(channels, 0).flatten(1)


@torch.no_grad()
def with_rounded_weights(model: nn.Module) -> nn.Module:
    """A copy that computes in float with the weights that int8 can hold; activations and biases are not rounded."""
    rounded = copy.deepcopy(model)
    for layer in weighted_layers(rounded).values():
        layer.weight.copy_(rounded_by_channel(layer.weight))
    return rounded


@torch.no_grad()
def outputs(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """What the model gives, of all batches together.

    Raises:
        ConfigurationError: That is not one tensor per batch.
    """
    given = [model(batch) for batch in batches]
    if not all(isinstance(output, Tensor) for output in given):
        raise ConfigurationError(
            f"{type(model).__name__} returns a {type(given[0]).__name__}; needed a model that returns one tensor, such "
            "as the logits of a classifier; wrap it in one that picks them"
        )
    return torch.cat(given)
