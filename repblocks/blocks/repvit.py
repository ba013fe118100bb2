"""RepViT's token mixer: a depthwise convolution with two shortcuts around it."""

from typing import Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv, conv_bn
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.fusion import Sum


@register_block("repvit")
class RepViTConv(RepConv):
    """``BN(BN(kxk(x)) + 1x1(x) + x)``, depthwise unless told otherwise, the 1x1 with a bias.

    The identity is there where input and output have one shape.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid;
            ``groups`` is ``in_channels`` by default.

    Source: Wang et al. 2024, "RepViT", https://arxiv.org/abs/2307.09283, section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | Pair = 3,
        **geometry: Unpack[Geometry],
    ) -> None:
        geometry.setdefault("groups", in_channels)
        spec = ConvSpec.of(in_channels, out_channels or in_channels, kernel_size, **geometry)
        branches: dict[str, nn.Module] = {"kxk": conv_bn(spec), "pointwise": conv(spec, (1, 1), bias=True)}
        if spec.keeps_the_map:
            branches["identity"] = nn.Identity()
        super().__init__(nn.Sequential(Sum(branches), nn.BatchNorm2d(spec.out_channels)))
