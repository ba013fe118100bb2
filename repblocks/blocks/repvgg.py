"""RepVGG: a 3x3, a 1x1 and an identity branch, each with its own BatchNorm."""

from typing import Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv_bn
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Identity, Pair
from repblocks.fusion import Sum


@register_block("repvgg")
class RepVGGConv(RepConv):
    """``BN(kxk(x)) + BN(1x1(x)) + BN(x)``, the identity where input and output have one shape.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.
        identity: "auto" has the branch where shapes allow, "always" insists on it, "never" leaves it out.

    Raises:
        ConfigurationError: ``identity="always"`` where the shapes of input and output differ, or an unknown choice.

    Source: Ding et al. 2021, "RepVGG", https://arxiv.org/abs/2101.03697, section 3.3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        *,
        identity: Identity = "auto",
        **geometry: Unpack[Geometry],
    ) -> None:
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        branches: dict[str, nn.Module] = {"kxk": conv_bn(spec), "pointwise": conv_bn(spec, (1, 1))}
        if spec.has_identity(identity):
            branches["identity"] = nn.BatchNorm2d(out_channels)
        super().__init__(Sum(branches))
