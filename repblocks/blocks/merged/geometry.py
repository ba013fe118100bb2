"""Where the patches of a block lie."""

from collections.abc import Sequence
from dataclasses import dataclass

from repblocks.fusion.geometry import Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Where the patches of a block lie: `AffineConv`'s fields for two dims, padding by zeros.

    A patch is ``u_t`` of P entries, channels of one group times taps, in the order of ``weight.flatten(1)``.
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: tuple[Pair, Pair]
    dilation: Pair
    groups: int

    @property
    def taps(self) -> int:
        """Positions that a kernel reads."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def patch_size(self) -> int:
        """P."""
        return self.in_channels // self.groups * self.taps

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the merged kernel, as ``nn.Conv2d`` has it."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def output_size(self, size: Sequence[int]) -> Pair:
        """Height and width of the output."""
        height, width = (
            (n + sum(p) - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        )
        return height, width
