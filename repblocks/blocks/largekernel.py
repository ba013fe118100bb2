"""RepLKNet: a small kernel beside a very large one."""

from typing import Unpack

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv_bn
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.fusion import Sum


@register_block("largekernel")
class LargeKernelConv(RepConv):
    """``BN(large(x)) + BN(small(x))``, depthwise unless told otherwise.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid;
            ``groups`` is ``in_channels`` by default.
        small_kernel: Size of the small one, at most that of the large one.

    Source: Ding et al. 2022, "Scaling Up Your Kernels to 31x31", https://arxiv.org/abs/2203.06717, guideline 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | Pair = 31,
        *,
        small_kernel: int = 5,
        **geometry: Unpack[Geometry],
    ) -> None:
        geometry.setdefault("groups", in_channels)
        spec = ConvSpec.of(in_channels, out_channels or in_channels, kernel_size, **geometry)
        height, width = (min(size, small_kernel) for size in spec.kernel_size)
        super().__init__(Sum({"large": conv_bn(spec), "small": conv_bn(spec, (height, width))}))
