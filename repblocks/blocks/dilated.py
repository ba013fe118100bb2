"""UniRepLKNet: small dilated kernels inside a large one."""

from collections.abc import Sequence
from typing import Unpack

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv_bn
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.errors import ConfigurationError
from repblocks.fusion import Sum

_PUBLISHED: dict[Pair, tuple[Pair, ...]] = {
    (17, 17): ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    (15, 15): ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    (13, 13): ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    (11, 11): ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    (9, 9): ((5, 1), (5, 2), (3, 3), (3, 4)),
    (7, 7): ((5, 1), (3, 2), (3, 3)),
    (5, 5): ((3, 1), (3, 2)),
}


@register_block("dilated")
class DilatedRepConv(RepConv):
    """``BN(large(x)) + sum BN(small, dilated(x))``, depthwise unless told otherwise.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid;
            ``groups`` is ``in_channels`` by default.
        small: Size and dilation of each small kernel; by default the published ones, or 3x3 with all that fit.

    Raises:
        ConfigurationError: A small kernel reaches beyond the large one.

    Source: Ding et al. 2024, "UniRepLKNet", https://arxiv.org/abs/2311.15599, section 3.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | Pair = 13,
        *,
        small: Sequence[Pair] | None = None,
        **geometry: Unpack[Geometry],
    ) -> None:
        geometry.setdefault("groups", in_channels)
        spec = ConvSpec.of(in_channels, out_channels or in_channels, kernel_size, **geometry)
        room = min(spec.kernel_size) - 1
        fitting = tuple((3, dilation + 1) for dilation in range(room // 2))
        kernels = _PUBLISHED.get(spec.kernel_size, fitting) if small is None else small
        if any(dilation * (size - 1) > room for size, dilation in kernels):
            raise ConfigurationError(f"small={kernels}: dilation * (size - 1) must be at most {room} inside {spec}")
        branches = {"large": conv_bn(spec)}
        for size, dilation in kernels:
            spacing = (dilation * spec.dilation[0], dilation * spec.dilation[1])
            branches[f"small{size}_{dilation}"] = conv_bn(spec, (size, size), dilation=spacing)
        super().__init__(Sum(branches))
