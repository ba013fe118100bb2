"""OREPA: scaled linear branches that are squeezed into one kernel in every forward pass."""

from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv, identity_pointwise, pointwise, scaled
from repblocks.blocks.layers import AlignedAvgPool2d, FixedConv2d, Squeezed
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.fusion import Sum


@register_block("orepa")
class OREPAConv(RepConv):
    """``BN(sum of scaled linear branches (x))``: one convolution and one BatchNorm run, in training too.

    The branches: kxk, 1x1-average, 1x1-cosines, 1x1-kxk, 1x1, and depthwise kxk-1x1 over eight times the channels.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.

    Source: Hu et al. 2022, "Online Convolutional Re-parameterization", https://arxiv.org/abs/2204.00826, section 3.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Pair = 3, **geometry: Unpack[Geometry]
    ) -> None:
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        waves = FixedConv2d(spec.depthwise(out_channels), _cosines(out_channels, spec.kernel_size))
        inner = replace(spec, in_channels=in_channels * (1 if spec.groups <= 4 else 2))
        wide = replace(spec, out_channels=8 * in_channels, groups=in_channels)
        mix = pointwise(replace(spec, in_channels=wide.out_channels), out_channels)
        chains: dict[str, tuple[float, list[nn.Module]]] = {
            "kxk": (0.25, [_he(conv(spec))]),
            "average": (0.25, [_he(pointwise(spec, out_channels)), AlignedAvgPool2d(spec)]),
            "cosines": (0.0, [_he(pointwise(spec, out_channels)), waves]),
            "pointwise_kxk": (0.5, [identity_pointwise(spec, inner.in_channels), _he(conv(inner))]),
            "pointwise": (1.0, [_he(conv(spec, (1, 1)))]),
            "separable": (0.5, [_he(conv(wide)), _he(mix)]),
        }
        branches = {name: scaled(nn.Sequential(*chain), out_channels, at) for name, (at, chain) in chains.items()}
        super().__init__(nn.Sequential(Squeezed(Sum(branches)), nn.BatchNorm2d(out_channels)))


def _he(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_uniform_(layer.weight)
    return layer


def _cosines(channels: int, kernel_size: Pair) -> Tensor:
    """Half of the channels vary along the height, half along the width, each at a frequency of its own."""
    height, width = (torch.pi * (torch.arange(size) + 0.5) / size for size in kernel_size)
    first, second = (torch.arange(1, count + 1)[:, None] for count in (channels // 2, channels - channels // 2))
    rows, columns = torch.cos(first * height)[:, :, None], torch.cos(second * width)[:, None, :]
    return torch.cat([rows.expand(-1, -1, len(width)), columns.expand(-1, len(height), -1)])
