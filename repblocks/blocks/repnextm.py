"""RepNeXt-M's medium unit: square, flat and serial kernels of decreasing size over one map."""

from collections.abc import Callable
from typing import Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv, serial
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.fusion import Sum


@register_block("repnextm")
class RepNeXtMConv(RepConv):
    """``norm(kxk + (k-2)x(k-4) + (k-4)x(k-2) + 1xk - kx1 + 1x(k-2) - (k-2)x1)``, depthwise unless told otherwise.

    The last two branches are each two convolutions in series, without bias; the others have one. Kernels are no
    smaller than one pixel. This is the unit of suous/RepNeXt, not the `RepUnit` of this project's RepNeXt.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid;
            ``groups`` is ``in_channels`` by default.
        norm_layer: Makes the norm of the sum from ``out_channels``; None for none, where the network has its own.

    Source: Zhao et al. 2024, "RepNeXt", https://arxiv.org/abs/2406.16004, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | Pair = 7,
        *,
        norm_layer: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        **geometry: Unpack[Geometry],
    ) -> None:
        geometry.setdefault("groups", in_channels)
        spec = ConvSpec.of(in_channels, out_channels or in_channels, kernel_size, **geometry)
        small, smaller = spec.shrunk(2), spec.shrunk(4)
        total = Sum(
            {
                "square": conv(spec, bias=True),
                "tall": conv(spec, (small[0], smaller[1]), bias=True),
                "wide": conv(spec, (smaller[0], small[1]), bias=True),
                "serial": serial(spec, spec.kernel_size),
                "small_serial": serial(spec, small),
            }
        )
        super().__init__(total if norm_layer is None else nn.Sequential(total, norm_layer(spec.out_channels)))
