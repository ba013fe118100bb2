"""ExpandNets: a convolution over-parameterized as a chain of linear ones."""

from dataclasses import replace
from typing import Literal, Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv, kernel_chain, pointwise
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.names import known_name


@register_block("expand")
class ExpandConv(RepConv):
    """``BN(1x1(kxk(1x1(x))))``, or ``BN(3x3(..3x3(x)))`` whose kernels make up one of kxk; nothing between them.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.
        chain: "pointwise" (the paper's CL) or "kernels" (its CK, where the first pads for all and the last strides).
        expansion: Channels inside the chain, relative to those of its input, behind the kxk of its output.

    Raises:
        ConfigurationError: An unknown chain.

    Source: Guo et al. 2020, "ExpandNets", https://arxiv.org/abs/1811.10495, section 3; seed 000.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        *,
        chain: Literal["pointwise", "kernels"] = "pointwise",
        expansion: int = 4,
        **geometry: Unpack[Geometry],
    ) -> None:
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        known_name("chain", chain, ("pointwise", "kernels"))
        wide = replace(spec, in_channels=expansion * in_channels, out_channels=expansion * out_channels)
        after = replace(spec, in_channels=wide.out_channels)
        links = [pointwise(spec, wide.in_channels), conv(wide), pointwise(after, out_channels)]
        links = links if chain == "pointwise" else kernel_chain(spec, wide.in_channels)
        super().__init__(nn.Sequential(*links, nn.BatchNorm2d(out_channels)))
