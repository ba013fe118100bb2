"""ECBSR's edge-oriented convolution block for super-resolution."""

from dataclasses import replace
from typing import Unpack

import torch
from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv, pointwise, scaled
from repblocks.blocks.layers import FixedConv2d
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.errors import ConfigurationError
from repblocks.fusion import Sum

_SOBEL = [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]
_FILTERS = {
    "sobel_x": _SOBEL,
    "sobel_y": [list(row) for row in zip(*_SOBEL, strict=True)],
    "laplacian": [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]],
}


@register_block("edge")
class EdgeConv(RepConv):
    """``kxk(x) + kxk(1x1(x)) + s1 * sobel_x(1x1(x)) + s2 * sobel_y(1x1(x)) + s3 * laplacian(1x1(x)) + b``.

    No BatchNorm, as super-resolution wants it; the scales s are learned per channel. The paper's biases behind the 1x1s
    are left out: padded by themselves as there, the edge filters cancel them, and the kxk turns its own into b.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.

    Raises:
        ConfigurationError: ``kernel_size`` is below 3, where the filters do not fit.

    Source: Zhang et al. 2021, "Edge-oriented Convolution Block for Real-time Super Resolution on Mobile Devices",
        https://doi.org/10.1145/3474085.3475291, section 3.2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Pair = 3, **geometry: Unpack[Geometry]
    ) -> None:
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        if min(spec.kernel_size) < 3:
            raise ConfigurationError(f"{spec}: the edge filters are 3x3 and need a kernel_size of at least 3")
        wide = 2 * out_channels
        expanded = nn.Sequential(pointwise(spec, wide), conv(replace(spec, in_channels=wide)))
        branches: dict[str, nn.Module] = {"kxk": conv(spec, bias=True), "pointwise_kxk": expanded}
        for name, rows in _FILTERS.items():
            edges = FixedConv2d(spec.depthwise(out_channels), torch.tensor(rows))
            branches[name] = scaled(nn.Sequential(pointwise(spec, out_channels), edges), out_channels, 1e-3)
        super().__init__(Sum(branches))
