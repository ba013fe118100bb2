"""The branches that blocks are built from, each over the geometry of its block."""

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest

import torch
from timm.layers import LayerScale2d  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from repblocks.blocks.layers import AlignedConv2d, BorderedNorm
from repblocks.blocks.spec import NO_PADDING, ConvSpec
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


def conv_bn(
    spec: ConvSpec, kernel_size: Pair | None = None, *, dilation: Pair | None = None, eps: float = 1e-5
) -> nn.Sequential:
    """`conv` without bias, then BatchNorm."""
    return nn.Sequential(conv(spec, kernel_size, dilation=dilation), nn.BatchNorm2d(spec.out_channels, eps))


def serial(spec: ConvSpec, kernel_size: Pair) -> nn.Sequential:
    """A row kernel, then a column kernel, without biases: one kernel of this size of rank 1, centred in the block's.

    The first one pads for both, so that they fold in every padding mode.
    """
    (height, width), (down, right) = kernel_size, spec.stride
    window = spec.window(kernel_size, spec.dilation)
    row = replace(spec, kernel_size=(1, width), stride=(1, right), padding=window)
    column = replace(row, in_channels=spec.out_channels, kernel_size=(height, 1), stride=(down, 1), padding=NO_PADDING)
    return nn.Sequential(conv(row), conv(column))


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
    outside, inside = (spec.padding, NO_PADDING) if spec.padding_mode == "zeros" else (NO_PADDING, spec.padding)
    return nn.Sequential(BorderedNorm(spec.in_channels, outside), make(replace(spec, padding=inside)))


def scaled(branch: nn.Module, channels: int, initial: float) -> nn.Sequential:
    """A branch, then a learned factor for each of its channels."""
    return nn.Sequential(branch, LayerScale2d(channels, initial))


def kernel_chain(spec: ConvSpec, inner_channels: int) -> list[nn.Conv2d]:
    """Convolutions of 3x3, and a last one of 2 for an even size, that reach as far as the block's kernel.

    The first pads for all and the last strides, so that nothing stands between them but linear maps.
    """
    sizes = list(zip_longest(*map(_steps, spec.kernel_size), fillvalue=1))
    widths = [spec.in_channels, *[inner_channels] * (len(sizes) - 1), spec.out_channels]
    links = [replace(spec, kernel_size=size, padding=NO_PADDING, stride=(1, 1)) for size in sizes]
    links[0] = replace(links[0], padding=spec.padding)
    links[-1] = replace(links[-1], stride=spec.stride)
    ends = zip(links, widths, widths[1:], strict=False)
    return [conv(replace(link, in_channels=reads, out_channels=writes)) for link, reads, writes in ends]


def _steps(size: int) -> list[int]:
    return [3] * ((size - 1) // 2) + [2] * ((size - 1) % 2) or [1]
