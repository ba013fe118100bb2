"""RepGhost: the concatenation of Ghost modules replaced by a sum that collapses."""

from collections.abc import Callable
from typing import Unpack

from torch import Tensor, nn

from repblocks.blocks.base import BranchConv, RepBlock
from repblocks.blocks.branches import conv_bn
from repblocks.blocks.spec import ConvSpec, Geometry, Pair


class RepGhostModule(RepBlock):
    """``act(BN(dw(p)) + BN(p))`` of ``p = act(BN(1x1(x)))``: in deploy form two convolutions, each activated.

    Args:
        in_channels, out_channels: Of the module; the depthwise part works on ``out_channels``.
        kernel_size: Of the depthwise part, which keeps the grid.
        primary_kernel_size: Of the first convolution.
        geometry: Of the first convolution, as in ``nn.Conv2d``; ``padding=None`` keeps the grid. ``dilation`` and
            ``padding_mode`` are the depthwise part's too.
        act_layer: Makes each of the two activations; None for none.

    Raises:
        ConfigurationError: They do not describe a convolution.

    Source: Chen et al. 2022, "RepGhost", https://arxiv.org/abs/2211.06088, section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        *,
        primary_kernel_size: int | Pair = 1,
        act_layer: Callable[[], nn.Module] | None = nn.ReLU,
        **geometry: Unpack[Geometry],
    ) -> None:
        super().__init__()
        primary = ConvSpec.of(in_channels, out_channels, primary_kernel_size, **geometry)
        depthwise = ConvSpec.of(
            out_channels,
            out_channels,
            kernel_size,
            dilation=primary.dilation,
            groups=out_channels,
            padding_mode=primary.padding_mode,
        )
        self.primary = BranchConv({"kxk": conv_bn(primary)})
        self.primary_act = None if act_layer is None else act_layer()
        self.cheap = BranchConv({"depthwise": conv_bn(depthwise), "identity": nn.BatchNorm2d(out_channels)})
        self.act = None if act_layer is None else act_layer()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""
        x = self.primary(x)
        x = self.cheap(x if self.primary_act is None else self.primary_act(x))
        return x if self.act is None else self.act(x)
