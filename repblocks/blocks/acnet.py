"""ACNet: asymmetric kernels strengthen the skeleton of a square one."""

from typing import Unpack

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv_bn
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.fusion import Sum


@register_block("acb")
class ACConv(RepConv):
    """``BN(kxk(x)) + BN(1xk(x)) + BN(kx1(x))``.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.

    Source: Ding et al. 2019, "ACNet", https://arxiv.org/abs/1908.03930, section 3.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Pair = 3, **geometry: Unpack[Geometry]
    ) -> None:
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        height, width = spec.kernel_size
        horizontal, vertical = conv_bn(spec, (1, width)), conv_bn(spec, (height, 1))
        super().__init__(Sum({"square": conv_bn(spec), "horizontal": horizontal, "vertical": vertical}))
