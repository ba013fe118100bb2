"""Diverse Branch Block: branches of different scale and complexity, like an Inception block."""

from dataclasses import replace
from typing import Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import after_norm, conv, conv_bn, identity_pointwise, pointwise
from repblocks.blocks.layers import AlignedAvgPool2d
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.fusion import Sum


@register_block("dbb")
class DBBConv(RepConv):
    """``BN(kxk(x)) + BN(1x1(x)) + BN(kxk(BN(1x1(x)))) + BN(average(BN(1x1(x))))``.

    The inner BatchNorms see the unpadded map, and the border is padded by their image of zero. The 1x1 in front of the
    kxk starts as the identity. Depthwise blocks have no 1x1 by itself and none before the average, and the one before
    the kxk doubles the channels.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.

    Source: Ding et al. 2021, "Diverse Branch Block", https://arxiv.org/abs/2103.13425, sections 3.2 and 3.3.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Pair = 3, **geometry: Unpack[Geometry]
    ) -> None:
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        single, norm = spec.is_depthwise, nn.BatchNorm2d(out_channels)
        first = pointwise(spec, 2 * in_channels) if single else identity_pointwise(spec, in_channels)
        inner = replace(spec, in_channels=first.out_channels)
        branches: dict[str, nn.Module] = {
            "kxk": conv_bn(spec),
            "pointwise_kxk": nn.Sequential(first, *after_norm(inner, conv), nn.BatchNorm2d(out_channels)),
            "average": nn.Sequential(AlignedAvgPool2d(spec), norm),
        }
        if not single:
            before = pointwise(spec, out_channels)
            branches["average"] = nn.Sequential(
                before, *after_norm(spec.depthwise(out_channels), AlignedAvgPool2d), norm
            )
            branches["pointwise"] = conv_bn(spec, (1, 1))
        super().__init__(Sum(branches))
