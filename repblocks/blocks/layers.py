"""Layers that torch lacks, each with its rule of folding: aligned, fixed and online convolutions, bordered norms."""

from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from repblocks.blocks.spec import ConvSpec
from repblocks.errors import FoldError
from repblocks.fusion import AffineConv, constructors, fold, from_batch_norm, identity, scale
from repblocks.fusion.affine_conv import PaddingMode, grow
from repblocks.fusion.fold import known_channels
from repblocks.fusion.geometry import Pair, flat_padding


def _padded(x: Tensor, padding: tuple[Pair, Pair], mode: PaddingMode) -> Tensor:
    if not any(map(any, padding)):
        return x
    return F.pad(x, flat_padding(padding), "constant" if mode == "zeros" else mode)


class AlignedConv2d(nn.Conv2d):
    """A convolution with its own padding on every side, which crops where negative.

    So a small kernel reads exactly the pixels that the centre of its block's large kernel reads, whatever that
    pads. A pointwise convolution strides by slicing its input first: the same result, and the backward of a strided
    1x1 convolution over 3 or 4 channels_last channels corrupts memory in torch 2.13 and 2.14 on CPU.

    Args:
        spec: The geometry of the block.
        kernel_size: This kernel's size, centred in the block's.
        dilation: Its own dilation, where it differs from the block's.
    """

    def __init__(self, spec: ConvSpec, kernel_size: Pair, *, dilation: Pair | None = None, bias: bool = False) -> None:
        super().__init__(
            spec.in_channels,
            spec.out_channels,
            kernel_size,
            spec.stride,
            dilation=dilation or spec.dilation,
            groups=spec.groups,
            bias=bias,
            padding_mode=spec.padding_mode,
        )
        self.spec, self.window = spec, spec.window(kernel_size, dilation or spec.dilation)

    def forward(self, input: Tensor) -> Tensor:  # nn.Conv2d's name
        """Pad, crop, and convolve."""
        x = self._crop(_padded(input, self.margin, self.spec.padding_mode))
        stride = self.stride
        if self.kernel_size == (1, 1):
            x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
        return F.conv2d(x, self.weight, self.bias, stride, 0, self.dilation, self.groups)

    @property
    def margin(self) -> tuple[Pair, Pair]:
        """The padding of the window, without what it crops."""
        (top, bottom), (left, right) = self.window
        return (max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))

    def _crop(self, x: Tensor) -> Tensor:
        cut = [min(side, 0) for side in flat_padding(self.window)]
        return F.pad(x, cut) if any(cut) else x

    def extra_repr(self) -> str:
        """As nn.Conv2d's, with the window."""
        return f"{super().extra_repr()}, window={self.window}"


@fold.register(AlignedConv2d, reads=lambda conv: conv.in_channels)
def _fold_aligned(module: AlignedConv2d, in_channels: int | None) -> AffineConv:
    """A crop is a kernel with zero taps over the pixels that it skips."""
    value = AffineConv(
        weight=module.weight,
        bias=module.bias,
        stride=module.stride,
        padding=module.margin,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.spec.padding_mode,
    )
    crop = tuple((max(-before, 0), max(-after, 0)) for before, after in module.window)
    return replace(grow(value, crop), padding=value.padding)


class FixedConv2d(AlignedConv2d):
    """A depthwise convolution by given filters, which are not learned but saved with the weights.

    Args:
        spec: The geometry of the block, depthwise.
        filters: ``[kernel height, kernel width]``, the same for every channel, or ``[channels, height, width]``.
    """

    def __init__(self, spec: ConvSpec, filters: Tensor) -> None:
        height, width = filters.shape[-2:]
        super().__init__(spec, (height, width))
        kernel = filters.expand(spec.in_channels, height, width).unsqueeze(1)
        del self.weight
        self.register_buffer("weight", kernel.clone())


class AlignedAvgPool2d(nn.Module):
    """The mean over a block's window, with its padding, mode of padding and dilation; padding counts.

    Args:
        spec: The geometry of the block.
    """

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C, H', W']``."""
        x, size = _padded(x, self.spec.padding, self.spec.padding_mode), self.spec.kernel_size
        if self.spec.dilation == (1, 1):
            return F.avg_pool2d(x, size, self.spec.stride)
        kernel = x.new_full((x.shape[1], 1, *size), 1 / prod(size))
        return F.conv2d(x, kernel, None, self.spec.stride, 0, self.spec.dilation, x.shape[1])

    def extra_repr(self) -> str:
        """The window."""
        return f"{self.spec.kernel_size}, stride={self.spec.stride}, padding={self.spec.padding}"


@fold.register(AlignedAvgPool2d)
def _fold_aligned_pool(module: AlignedAvgPool2d, in_channels: int | None) -> AffineConv:
    spec = module.spec
    mean = constructors.average(known_channels(module, in_channels), spec.kernel_size, dtype=torch.float64)
    geometry = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation}
    return replace(mean, **geometry, padding_mode=spec.padding_mode)


class Constant(nn.Module):
    """The input times a number: -1 subtracts a branch in a sum of branches, 1 / n makes the sum of n a mean."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``[N, C, ...]``."""
        return self.factor * x

    def extra_repr(self) -> str:
        """The number."""
        return f"{self.factor}"


class Shift(nn.Module):
    """A learned number for each channel, added to it; it starts at 0.

    Args:
        channels: Channels of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shift ``[N, C, H, W]``."""
        return x + self.bias[:, None, None]

    def extra_repr(self) -> str:
        """The channels."""
        return f"{len(self.bias)}"


class Squeezed(nn.Module):
    """Branches that fold in every forward pass: one convolution runs, however many branches there are.

    ``Squeezed(m)(x) == m(x)``, and gradients reach the branches through the fold. They must not depend on the batch,
    so BatchNorm has its place behind.

    Args:
        branches: A module that `fold` understands in training mode.

    Source: Hu et al. 2022, "Online Convolutional Re-parameterization", https://arxiv.org/abs/2204.00826, section 3.
    """

    def __init__(self, branches: nn.Module) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        """Fold, then convolve ``[N, C, H, W]`` once."""
        return fold(self.branches, x.shape[1])(x)


class BorderedNorm(nn.Module):
    """BatchNorm that pads its output by its own image of zero: what comes out if zeros had been normalised too.

    So ``conv(norm(x))`` with a padded convolution folds into a padded convolution, although the statistics see
    only the map. The image follows the batch in training, the running statistics in eval mode.

    Args:
        num_features: Channels.
        padding: ``((top, bottom), (left, right))`` around the output.

    Source: Ding et al. 2021, "Diverse Branch Block", https://arxiv.org/abs/2103.13425, section 3.2.
    """

    def __init__(self, num_features: int, padding: tuple[Pair, Pair]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[N, C, H, W]`` and pad it."""
        if not any(map(any, self.padding)):
            return self.norm(x)
        border = self._image_of_zero(x)[:, None, None]
        return F.pad(self.norm(x) - border, flat_padding(self.padding)) + border

    def _image_of_zero(self, x: Tensor) -> Tensor:
        if not self.norm.training and self.norm.running_mean is not None:
            value = from_batch_norm(self.norm)
        else:
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            value = constructors.normalisation(self.norm, mean, variance)
        assert value.bias is not None
        return value.bias


@fold.register(BorderedNorm, reads=lambda bordered: bordered.norm.num_features)
def _fold_bordered_norm(module: BorderedNorm, in_channels: int | None) -> AffineConv:
    return replace(fold(module.norm).promote(2), padding=module.padding)


@fold.register(Constant)
def _fold_constant(module: Constant, in_channels: int | None) -> AffineConv:
    return scale(torch.full((known_channels(module, in_channels),), module.factor, dtype=torch.float64))


@fold.register(Shift, reads=lambda layer: len(layer.bias))
def _fold_shift(module: Shift, in_channels: int | None) -> AffineConv:
    return replace(scale(torch.ones_like(module.bias)), bias=module.bias)


@fold.register(Squeezed, reads=lambda squeezed: fold.channels_read(squeezed.branches))
def _fold_squeezed(module: Squeezed, in_channels: int | None) -> AffineConv:
    return fold(module.branches, in_channels)


@fold.register(LayerScale2d, reads=lambda layer: len(layer.gamma))
def _fold_layer_scale(module: LayerScale2d, in_channels: int | None) -> AffineConv:
    return scale(module.gamma)


@fold.register(DropPath, StochasticDepth)
def _fold_drop_path(module: DropPath | StochasticDepth, in_channels: int | None) -> AffineConv:
    rate = module.p if isinstance(module, StochasticDepth) else module.drop_prob
    if module.training and rate > 0:
        raise FoldError(f"{module!r} is in training mode and drops at random; call eval() first")
    return identity(known_channels(module, in_channels), dtype=torch.float64)
