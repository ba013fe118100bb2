"""The pieces that blocks are built from: convolutions aligned to their block's window, BatchNorms, and drop path."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.layers import DropPath  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from repblocks.blocks.spec import ConvSpec
from repblocks.errors import FoldError
from repblocks.fusion import AffineConv, fold, from_batch_norm, identity
from repblocks.fusion.affine_conv import grow
from repblocks.fusion.constructors import normalisation
from repblocks.fusion.geometry import Pair, flat_padding


class AlignedConv2d(nn.Conv2d):
    """A convolution with its own padding on every side, which crops where negative.

    So a small kernel reads exactly the pixels that the centre of its block's large kernel reads, whatever that
    pads. A pointwise convolution strides by slicing its input first: the same result, and the backward of a strided
    1x1 convolution over 3 or 4 channels_last channels corrupts memory in torch 2.13 and 2.14 on CPU.

    Args:
        spec: The geometry of the block.
        kernel_size: This kernel's size, centred in the block's.
    """

    def __init__(self, spec: ConvSpec, kernel_size: Pair, *, bias: bool) -> None:
        super().__init__(
            spec.in_channels,
            spec.out_channels,
            kernel_size,
            spec.stride,
            dilation=spec.dilation,
            groups=spec.groups,
            bias=bias,
            padding_mode=spec.padding_mode,
        )
        self.spec, self.window = spec, spec.window(kernel_size)

    def forward(self, input: Tensor) -> Tensor:  # nn.Conv2d's name
        """Pad, crop, and convolve."""
        x = self._crop(self._pad(input))
        stride = self.stride
        if self.kernel_size == (1, 1):
            x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
        return F.conv2d(x, self.weight, self.bias, stride, 0, self.dilation, self.groups)

    @property
    def margin(self) -> tuple[Pair, Pair]:
        """The padding of the window, without what it crops."""
        (top, bottom), (left, right) = self.window
        return (max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))

    def _pad(self, x: Tensor) -> Tensor:
        if not any(map(any, self.margin)):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, flat_padding(self.margin), mode)

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
            value = normalisation(self.norm, mean, variance)
        assert value.bias is not None
        return value.bias


@fold.register(BorderedNorm, reads=lambda bordered: bordered.norm.num_features)
def _fold_bordered_norm(module: BorderedNorm, in_channels: int | None) -> AffineConv:
    return replace(fold(module.norm).promote(2), padding=module.padding)


@fold.register(DropPath, StochasticDepth)
def _fold_drop_path(module: DropPath | StochasticDepth, in_channels: int | None) -> AffineConv:
    rate = module.p if isinstance(module, StochasticDepth) else module.drop_prob
    if module.training and rate > 0:
        raise FoldError(f"{module!r} is in training mode and drops at random; call eval() first")
    if in_channels is None:
        raise FoldError(f"{module!r} does not tell its channels; call fold(module, in_channels=...)")
    return identity(in_channels, dtype=torch.float64)


def conv(spec: ConvSpec, kernel_size: Pair | None = None, *, bias: bool = False) -> nn.Conv2d:
    """A convolution of the block's geometry, or a smaller kernel centred in it; plain ``nn.Conv2d`` where that can."""
    size = spec.kernel_size if kernel_size is None else kernel_size
    top, left = spec.window(size)
    even = top[0] == top[1] >= 0 and left[0] == left[1] >= 0
    if not even or (size == (1, 1) and spec.stride != (1, 1)):
        return AlignedConv2d(spec, size, bias=bias)
    return nn.Conv2d(
        spec.in_channels,
        spec.out_channels,
        size,
        spec.stride,
        (top[0], left[0]),
        spec.dilation,
        spec.groups,
        bias=bias,
        padding_mode=spec.padding_mode,
    )


def conv_bn(spec: ConvSpec, kernel_size: Pair | None = None) -> nn.Sequential:
    """`conv` without bias, then BatchNorm."""
    return nn.Sequential(conv(spec, kernel_size), nn.BatchNorm2d(spec.out_channels))
