"""FastViT's token mixer: a depthwise convolution that also takes the place of the shortcut around it."""

from typing import Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv_bn, scaled
from repblocks.blocks.layers import Constant
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.errors import ConfigurationError
from repblocks.fusion import Sum


@register_block("repmixer")
class RepMixer(RepConv):
    """``x + scale * (BN(kxk(x)) + BN(1x1(x)) + BN(x) - BN(x))``, depthwise unless told otherwise.

    The first three branches are MobileOne's, the last one stands for the map that they are compared with.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid;
            ``groups`` is ``in_channels`` by default.
        layer_scale: What ``scale`` starts at.

    Raises:
        ConfigurationError: Input and output differ in shape, so that x cannot be added.

    Source: Vasu et al. 2023, "FastViT", https://arxiv.org/abs/2303.14189, section 3.2.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | Pair = 3,
        *,
        layer_scale: float = 1e-5,
        **geometry: Unpack[Geometry],
    ) -> None:
        geometry.setdefault("groups", in_channels)
        spec = ConvSpec.of(in_channels, out_channels or in_channels, kernel_size, **geometry)
        if not spec.keeps_the_map:
            raise ConfigurationError(f"{spec} changes the shape of the map; RepMixer adds it to its input")
        norm, reference = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(in_channels)
        mixed = {"kxk": conv_bn(spec), "pointwise": conv_bn(spec, (1, 1)), "identity": norm}
        difference = Sum({**mixed, "reference": nn.Sequential(reference, Constant(-1.0))})
        super().__init__(Sum({"shortcut": nn.Identity(), "mixed": scaled(difference, in_channels, layer_scale)}))
