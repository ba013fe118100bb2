"""Which operations of torch are linear: functions, methods and layers by name, and what their arguments mean."""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.padding import (
    _CircularPadNd,  # pyright: ignore[reportPrivateUsage]  # bases of the padding layers
    _ConstantPadNd,  # pyright: ignore[reportPrivateUsage]
    _ReflectionPadNd,  # pyright: ignore[reportPrivateUsage]
    _ReplicationPadNd,  # pyright: ignore[reportPrivateUsage]
)

from repblocks.errors import FoldError
from repblocks.fusion import AffineConv, from_pool, identity
from repblocks.fusion.affine_conv import PaddingMode
from repblocks.fusion.geometry import reach
from repblocks.graph.lazy import FLOAT64

Target = Callable[..., Any] | str

#: Operations that move, pick or average positions and treat all channels alike.
VIEWS: set[Target] = {
    torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.movedim,
    torch.swapaxes, torch.mean, torch.chunk, torch.split, torch.narrow, torch.tensor_split, torch.unbind,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.interpolate, operator.getitem,
    "flatten", "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze", "movedim", "swapaxes", "mean",
    "chunk", "split", "narrow", "tensor_split", "unbind", "reshape_as", "view_as", "unflatten",
}  # fmt: skip
#: Those that average, so that they cost a pass over the map; the others are free.
AVERAGES: set[Target] = {
    torch.mean, "mean", F.interpolate, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
}  # fmt: skip
MOVES = VIEWS - AVERAGES
VIEW_LAYERS = (
    nn.Flatten,
    nn.Unflatten,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.Upsample,
)
#: Operations that return their first argument, as far as numbers go.
COPIES: set[Target] = {"contiguous", "clone", torch.clone}
ADDITIONS: set[Target] = {operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__", "__radd__"}
SUBTRACTIONS: set[Target] = {operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "__sub__"}
PRODUCTS: set[Target] = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "__mul__", "__rmul__"}
QUOTIENTS: set[Target] = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"}
NEGATIONS: set[Target] = {operator.neg, torch.neg, torch.negative, "neg", "neg_"}
CONCATENATIONS: set[Target] = {torch.cat, torch.concat, torch.concatenate}
CONVOLUTIONS: dict[Target, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
#: Functions with a kernel.
WEIGHTED_FUNCTIONS: set[Target] = {*CONVOLUTIONS, F.linear}
POOLS: dict[Target, type[nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d]] = {
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.avg_pool3d: nn.AvgPool3d,
}
DROPOUTS: set[Target] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
PAD_LAYERS = (_ConstantPadNd, _ReflectionPadNd, _ReplicationPadNd, _CircularPadNd)

_PARAMETERS: dict[Target, tuple[str, ...]] = {
    **dict.fromkeys(CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.linear: ("input", "weight", "bias"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    F.pad: ("input", "pad", "mode", "value"),
    F.avg_pool1d: ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    **dict.fromkeys(
        (F.avg_pool2d, F.avg_pool3d),
        ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    **dict.fromkeys(DROPOUTS, ("input", "p", "training", "inplace")),
    **dict.fromkeys(CONCATENATIONS, ("tensors", "dim")),
}


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by torch's names, nodes in place of tensors."""
    names: tuple[str, ...] = _PARAMETERS[node.target]  # pyright: ignore[reportArgumentType]
    renamed = {"axis": "dim", "x": "input"}
    named = {renamed.get(name, name): value for name, value in node.kwargs.items()}
    return {**dict(zip(names, node.args, strict=False)), **named}


def convolution(rank: int, given: dict[str, Any], weight: Tensor, bias: Tensor | None) -> AffineConv:
    """The value of ``F.conv1d``, ``2d`` or ``3d`` called with these arguments."""

    def per_dim(name: str, default: int) -> tuple[int, ...]:
        size = given.get(name, default)
        return (size,) * rank if isinstance(size, int) else tuple(size) * (rank // len(size))

    dilation, padding = per_dim("dilation", 1), given.get("padding", 0)
    if padding == "same":
        sides = tuple((total // 2, total - total // 2) for total in reach(tuple(weight.shape[2:]), dilation))
    else:
        sides = () if padding == "valid" else tuple((p, p) for p in per_dim("padding", 0))
    return AffineConv(
        weight=weight,
        bias=bias,
        stride=per_dim("stride", 1),
        padding=sides,
        dilation=dilation,
        groups=given.get("groups", 1),
    )


def padding(channels: int, rank: int, given: dict[str, Any], device: str) -> AffineConv:
    """The value of ``F.pad``, whose amounts start at the last dim.

    Raises:
        FoldError: It crops, pads with a number or reaches past the spatial dims.
    """
    amounts, mode, value = given["pad"], given.get("mode", "constant"), given.get("value")
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    if len(pairs) > rank or min(amounts) < 0 or (mode == "constant" and value not in (None, 0)):
        raise FoldError(f"padding by {tuple(amounts)} (mode {mode!r}, value {value}) is not one of a convolution")
    sides = (*((0, 0),) * (rank - len(pairs)), *reversed(pairs))
    kept: PaddingMode = "zeros" if mode == "constant" else mode
    return replace(identity(channels, dtype=FLOAT64, device=device).promote(rank), padding=sides, padding_mode=kept)


def pad_layer(layer: nn.Module) -> dict[str, Any]:
    """The arguments of ``F.pad`` that a padding layer stands for."""
    modes = {_ReflectionPadNd: "reflect", _ReplicationPadNd: "replicate", _CircularPadNd: "circular"}
    mode = next((name for cls, name in modes.items() if isinstance(layer, cls)), "constant")
    return {"pad": layer.padding, "mode": mode, "value": getattr(layer, "value", None)}


def pooling(target: Target, channels: int, given: dict[str, Any], device: str) -> AffineConv:
    """The value of ``F.avg_pool1d``, ``2d`` or ``3d`` called with these arguments.

    Raises:
        FoldError: Its windows differ from each other.
    """
    options = {name: value for name, value in given.items() if name != "input"}
    return from_pool(POOLS[target](**options), channels, dtype=FLOAT64).to(device)


def is_fixed(given: dict[str, Any]) -> bool:
    """Whether sizes are numbers, rather than calculated from the input's."""
    sizes = [value for name, value in given.items() if name not in ("input", "weight", "bias")]
    found = list[fx.Node]()
    map_arg(sizes, found.append)
    return not found
