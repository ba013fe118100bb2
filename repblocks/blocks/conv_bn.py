"""The plain pair of a convolution and a BatchNorm."""

from typing import Unpack

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv_bn
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair


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
