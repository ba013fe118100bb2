"""The branches that blocks are built from, each over the geometry of its block."""

from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch
from timm.layers import LayerScale2d  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from repblocks.blocks.layers import AlignedConv2d, BorderedNorm, FixedConv2d
from repblocks.blocks.spec import ConvSpec
from repblocks.fusion.geometry import Pair


def conv(
    spec: ConvSpec, kernel_size: Pair | None = None, *, dilation: Pair | None = None, bias: bool = False
) -> nn.Conv2d:
    """A convolution of the block's geometry, or another kernel centred in it; plain ``nn.Conv2d`` where that can."""
    size, spacing = kernel_size or spec.kernel_size, dilation or spec.dilation
    top, left = spec.window(size, spacing)
    even = top[0] == top[1] >= 0 and left[0] == left[1] >= 0
    if not even or (size == (1, 1) and spec.stride != (1, 1)):
        return AlignedConv2d(spec, size, dilation=spacing, bias=bias)
    return nn.Conv2d(
        spec.in_channels,
        spec.out_channels,
        size,
        spec.stride,
        (top[0], left[0]),
        spacing,
        spec.groups,
        bias=bias,
        padding_mode=spec.padding_mode,
    )


def conv_bn(spec: ConvSpec, kernel_size: Pair | None = None, *, dilation: Pair | None = None) -> nn.Sequential:
    """`conv` without bias, then BatchNorm."""
    return nn.Sequential(conv(spec, kernel_size, dilation=dilation), nn.BatchNorm2d(spec.out_channels))


def pointwise(spec: ConvSpec, out_channels: int) -> nn.Conv2d:
    """The 1x1 convolution in front of a chain: the block's groups, every pixel, no bias."""
    return nn.Conv2d(spec.in_channels, out_channels, 1, groups=spec.groups, bias=False)


def identity_pointwise(spec: ConvSpec, out_channels: int) -> nn.Conv2d:
    """`pointwise` that starts by copying its channels, in order, as often as there is room in their group."""
    layer = pointwise(spec, out_channels)
    out = torch.arange(out_channels)
    with torch.no_grad():
        layer.weight.zero_()[out, out % layer.weight.shape[1]] = 1
    return layer


def after_norm(spec: ConvSpec, make: Callable[[ConvSpec], nn.Module]) -> nn.Sequential:
    """BatchNorm, then what ``make`` builds, so that they fold at the border too.

    Zero padding becomes the norm's own image of zero around its output; the other modes repeat normalised pixels.
    """
    outside, inside = (spec.padding, _NONE) if spec.padding_mode == "zeros" else (_NONE, spec.padding)
    return nn.Sequential(BorderedNorm(spec.in_channels, outside), make(replace(spec, padding=inside)))


def average(spec: ConvSpec) -> nn.Conv2d:
    """The mean over the block's window, for each channel by itself."""
    return FixedConv2d(spec.depthwise(spec.out_channels), torch.full(spec.kernel_size, 1 / prod(spec.kernel_size)))


def scaled(branch: nn.Module, channels: int, initial: float) -> nn.Sequential:
    """A branch, then a learned factor for each of its channels."""
    return nn.Sequential(branch, LayerScale2d(channels, initial))


_NONE = ((0, 0), (0, 0))
