"""MobileOne: several copies of a convolution, a pointwise one and an identity, each with its own BatchNorm."""

from typing import Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv_bn
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Identity, Pair
from repblocks.errors import ConfigurationError
from repblocks.fusion import Sum


@register_block("mobileone")
class MobileOneConv(RepConv):
    """``n * BN(kxk(x)) + BN(1x1(x)) + BN(x)``, the identity where input and output have one shape.

    A 1x1 block has no further 1x1 branch.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.
        num_conv_branches: n; 4 in MobileOne-S0, 1 in S1 to S4.
        identity: "auto" has the branch where shapes allow, "always" insists on it, "never" leaves it out.

    Raises:
        ConfigurationError: ``num_conv_branches`` is not positive, ``identity="always"`` where the shapes of input and
            output differ, or an unknown choice.

    Source: Vasu et al. 2023, "MobileOne", https://arxiv.org/abs/2206.04040, section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        *,
        num_conv_branches: int = 4,
        identity: Identity = "auto",
        **geometry: Unpack[Geometry],
    ) -> None:
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        if num_conv_branches < 1:
            raise ConfigurationError(f"num_conv_branches={num_conv_branches}: at least one branch has to convolve")
        branches: dict[str, nn.Module] = {f"kxk{i}": conv_bn(spec) for i in range(num_conv_branches)}
        if spec.kernel_size != (1, 1):
            branches["pointwise"] = conv_bn(spec, (1, 1))
        if spec.has_identity(identity):
            branches["identity"] = nn.BatchNorm2d(out_channels)
        super().__init__(Sum(branches))
