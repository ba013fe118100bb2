"""CSLA: constant-scale linear addition, the block that equals a plain convolution trained with multiplied gradients."""

from typing import Unpack

from timm.layers import LayerScale2d  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Identity, Pair
from repblocks.fusion import Sum


class ConstantScale2d(LayerScale2d):
    """A factor for each channel that is not learned, but saved with the weights."""

    def __init__(self, channels: int, factor: float) -> None:
        super().__init__(channels, factor)
        gamma = self.gamma.detach()
        del self.gamma
        self.register_buffer("gamma", gamma)


@register_block("csla")
class CSLAConv(RepConv):
    """``BN(s * kxk(x) + t * 1x1(x) + g * x)``: constants s and t, a learned g where input and output have one shape.

    `repblocks.RepOptimizer` trains its plain twin, a ``ConvBN``, to the same weights at the price of that.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.
        identity: "auto" has the branch where shapes allow, "always" insists on it, "never" leaves it out.
        scale, pointwise_scale: The constants, one for all channels; buffers ``gamma``, which may differ by channel.

    Raises:
        ConfigurationError: ``identity="always"`` where the shapes of input and output differ, or an unknown choice.

    Source: Ding et al. 2022, "Re-parameterizing Your Optimizers", https://arxiv.org/abs/2205.15242, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        *,
        identity: Identity = "auto",
        scale: float = 1.0,
        pointwise_scale: float = 1.0,
        **geometry: Unpack[Geometry],
    ) -> None:
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        pointwise = nn.Sequential(conv(spec, (1, 1)), ConstantScale2d(out_channels, pointwise_scale))
        kxk = nn.Sequential(conv(spec), ConstantScale2d(out_channels, scale))
        branches: dict[str, nn.Module] = {"kxk": kxk, "pointwise": pointwise}
        if spec.has_identity(identity):
            branches["identity"] = LayerScale2d(out_channels, 1.0)
        super().__init__(nn.Sequential(Sum(branches), nn.BatchNorm2d(out_channels)))
