"""The layer of torch that computes a form, in the dtype and on the device of what it takes the place of."""

from typing import Any

import torch
from torch import Tensor, nn

from repblocks.blocks.base import require_finite
from repblocks.errors import FoldError
from repblocks.fusion import AffineConv, fold
from repblocks.fusion.transposed import AnyConv


class ScaleShift(nn.Module):
    """A factor and a shift for each channel: ``weight * x + bias``, what is left of BatchNorms without a convolution.

    Args:
        weight: ``[channels]``.
        bias: ``[channels]``, or None.
        axis: Where the channels are.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, axis: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.axis = axis

    def forward(self, input: Tensor) -> Tensor:  # the name that torch's layers have
        """Scale and shift ``[N, ..., channels, ...]``."""
        shape = (-1, *(1,) * (input.ndim - 1 - self.axis))
        weight = self.weight.view(shape)
        return weight * input if self.bias is None else torch.addcmul(self.bias.view(shape), weight, input)

    def extra_repr(self) -> str:
        """The channels."""
        return f"{len(self.weight)}, axis={self.axis}"


@fold.register(ScaleShift, reads=lambda layer: len(layer.weight))
def _fold_scale_shift(module: ScaleShift, in_channels: int | None) -> AffineConv:
    if module.axis != 1:
        raise FoldError(f"{module!r} does not have its channels where convolutions have them")
    return AffineConv(weight=module.weight.unsqueeze(1), bias=module.bias, groups=len(module.weight))


def layer_of(value: AnyConv, *, axis: int, ndim: int, dtype: torch.dtype, like: nn.Module) -> nn.Module:
    """The layer that applies a value to tensors of ``ndim`` dims with their channels at ``axis``.

    Args:
        value: In float64.
        axis: Where the channels are in what it reads.
        ndim: Of what it reads.
        dtype: Of what it reads.
        like: What it takes the place of: chooses the device, and whether it is frozen.

    Raises:
        FoldError: A weight is not finite, or not in that dtype.
    """
    tensors = [tensor for tensor in (*like.parameters(), *like.buffers()) if tensor.is_floating_point()]
    device = tensors[0].device if tensors else torch.device("cpu")
    layer = _layer(value, axis, ndim, {"device": device, "dtype": dtype})
    require_finite(layer, value, remedy="collapse in a wider dtype")
    frozen = bool(tensors) and not any(parameter.requires_grad for parameter in like.parameters())
    return layer.requires_grad_(not frozen)


def _layer(value: AnyConv, axis: int, ndim: int, place: dict[str, Any]) -> nn.Module:
    if isinstance(value, AffineConv) and value.is_diagonal:
        shift = None if value.bias is None else value.bias.to(**place, copy=True)
        return ScaleShift(value.weight.flatten().to(**place, copy=True), shift, axis)
    if isinstance(value, AffineConv) and not value.rank and axis != ndim - 1:
        value = value.promote(ndim - 2)
    return value.to_module(**place)
