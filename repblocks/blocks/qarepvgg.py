"""QARepVGG: RepVGG whose collapsed kernels and activations quantize well."""

from typing import Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv, conv_bn
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Identity, Pair
from repblocks.fusion import Sum


@register_block("qarepvgg")
class QARepVGGConv(RepConv):
    """``BN(BN(kxk(x)) + 1x1(x) + x)``: one BatchNorm after the sum, none on the 1x1 and the identity.

    The identity is there where input and output have one shape.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.
        identity: "auto" has the branch where shapes allow, "always" insists on it, "never" leaves it out.

    Raises:
        ConfigurationError: ``identity="always"`` where the shapes of input and output differ, or an unknown choice.

    Source: Chu et al. 2022, "Make RepVGG Greater Again", https://arxiv.org/abs/2212.01593, section 4, setting S4.
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
        branches: dict[str, nn.Module] = {"kxk": conv_bn(spec), "pointwise": conv(spec, (1, 1))}
        if spec.has_identity(identity):
            branches["identity"] = nn.Identity()
        super().__init__(nn.Sequential(Sum(branches), nn.BatchNorm2d(out_channels)))
