"""Plain pairs of a convolution and a BatchNorm, in both orders."""

from dataclasses import replace
from typing import Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import BorderedNorm, conv, conv_bn
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry
from repblocks.fusion.geometry import Pair


@register_block("plain")
class ConvBN(RepConv):
    """Convolution, then BatchNorm: the plain twin of every other block (paradigm 1).

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", https://arxiv.org/abs/1502.03167.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Pair = 3, **geometry: Unpack[Geometry]
    ) -> None:
        super().__init__(conv_bn(ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)))


class BNConv(RepConv):
    """BatchNorm, then convolution: RepNeXt's downsampling layer (paradigm 8).

    Zero padding surrounds the normalised map by BatchNorm's image of zero, so that it folds at the border too; the
    other modes repeat normalised pixels.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``, with a stride of 2 by default;
            ``padding=None`` pads below and to the right just enough for ``size / stride`` output pixels.

    Source: seed of the project, RepNeXt-U3's ``downsample_layers``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Pair = 2, **geometry: Unpack[Geometry]
    ) -> None:
        geometry.setdefault("stride", 2)
        if geometry.get("padding") is None:
            unpadded = ConvSpec.of(in_channels, out_channels, kernel_size, **{**geometry, "padding": 0})
            geometry["padding"] = _just_enough(unpadded)
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        outside, inside = (spec.padding, _NONE) if spec.padding_mode == "zeros" else (_NONE, spec.padding)
        norm = BorderedNorm(in_channels, outside)
        super().__init__(nn.Sequential(norm, conv(replace(spec, padding=inside), bias=True)))


_NONE = ((0, 0), (0, 0))


def _just_enough(spec: ConvSpec) -> tuple[Pair, Pair]:
    below, right = (
        max(d * (k - 1) + 1 - s, 0) for d, k, s in zip(spec.dilation, spec.kernel_size, spec.stride, strict=True)
    )
    return (0, below), (0, right)
