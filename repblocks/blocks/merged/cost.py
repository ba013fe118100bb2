"""What each way to run a block costs, in estimated nanoseconds of one training step; a rule, so that runs repeat.

The rates were measured on one core of an AVX-512 CPU in channels_last. They decide between methods, nothing else.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from repblocks.fusion import AffineConv
from repblocks.fusion.matrix import output_size

PRODUCT = 1 / 45
"""Nanoseconds per multiply-accumulate of a dense product or convolution."""
DEPTHWISE = 1 / 20
"""Of a depthwise convolution of up to 3x3."""
ELEMENT = 0.13
"""Per element of one pass over a map."""
SCALING = 7.0
"""Of a depthwise convolution of 1x1, for which no library has a fast kernel."""
CALL = 10_000.0
"""Of one operation, however small."""


def separate_cost(branches: nn.Module, x: Tensor) -> float:
    """The branches as they are: three convolutions' worth each, BatchNorm's passes, the sum."""
    leaf_costs = [_leaf_cost(module, x) for module in branches.modules() if isinstance(module, nn.Conv2d)]
    norms = [m for m in branches.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore
    written = _written(branches, x)
    return 3 * sum(leaf_costs) + len(norms) * (10 * written * ELEMENT + 4 * CALL) + len(leaf_costs) * 6 * CALL


def _leaf_cost(conv: nn.Conv2d, x: Tensor) -> float:
    positions = _written(conv, x) / conv.out_channels
    single = conv.groups == conv.out_channels and math.prod(conv.kernel_size) == 1
    per_mac = SCALING if single else DEPTHWISE if conv.groups > 1 else PRODUCT
    return positions * conv.weight.numel() * per_mac


def _written(module: nn.Module, x: Tensor) -> float:
    """Elements of a branch's output, strides counted."""
    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    stride = max((conv.stride[0] * conv.stride[1] for conv in convs), default=1)
    channels = convs[-1].out_channels if convs else x.shape[1]
    return x.shape[0] * x.shape[2] * x.shape[3] / stride * channels


def outputs_cost(
    leaves: Sequence[nn.Module], again: Sequence[nn.Module], outputs: int, x: Tensor, *, nested: bool
) -> float:
    """Each convolution once or once more; for each output its statistics, combination, products and gradient."""
    convs = [conv for leaf in leaves for conv in leaf.modules() if isinstance(conv, nn.Conv2d)]
    repeated = [conv for leaf in again for conv in leaf.modules() if isinstance(conv, nn.Conv2d)]
    products = 3 * sum(_leaf_cost(conv, x) for conv in convs) + sum(_leaf_cost(conv, x) for conv in repeated)
    written = _written(leaves[0], x) if leaves else x.numel()
    passes = outputs * (6 + (2 * (outputs - 1) if nested else 0)) + 2
    return products + passes * written * ELEMENT + (40 + 8 * outputs + 40 * nested + 6 * len(convs)) * CALL


def program_cost(geometry: AffineConv, rows: int, *, nested: bool) -> float:
    """``w R``, ``sum w^T a w`` and the passes over rows."""
    entries = rows * geometry.weight.numel()
    products = 2 * entries * geometry.weight[0].numel()
    return products * PRODUCT + 10 * entries * ELEMENT + (70 + 60 * nested) * CALL


def pointwise_cost(geometry: AffineConv, x: Tensor) -> float:
    """Three products of the convolution, two of the moments."""
    positions = _positions(geometry, x)
    macs = positions * geometry.in_channels * (3 * geometry.out_channels + 2 * geometry.in_channels)
    return macs * PRODUCT + 4 * positions * geometry.in_channels * ELEMENT + 15 * CALL


def depthwise_cost(x: Tensor) -> float:
    """Three convolutions, two of them again for the lags, one of 5x5, copies and border strips."""
    taps = 9 * 5 + 25
    return x.numel() * (taps * DEPTHWISE + 9 * ELEMENT) + 140 * CALL


def unfolded_cost(geometry: AffineConv, x: Tensor) -> float:
    """Everything over patches that are laid out, twice over."""
    positions, size = _positions(geometry, x), geometry.weight[0].numel()
    per_mac = PRODUCT if geometry.groups == 1 else 10 * DEPTHWISE
    macs = positions * size * (3 * geometry.out_channels + 2 * geometry.groups * size * (1 + x.requires_grad))
    return macs * per_mac + positions * geometry.groups * size * ELEMENT * (4 + 8 * x.requires_grad) + 40 * CALL


def _positions(geometry: AffineConv, x: Tensor) -> int:
    return x.shape[0] * math.prod(output_size(geometry, x.shape[2:]))
