"""RepVGG: a 3x3, a 1x1 and an identity branch, each with its own BatchNorm."""

from collections.abc import Callable
from typing import Literal, Unpack

from torch import Tensor, nn

from repblocks.blocks.base import RepBlock, RepConv
from repblocks.blocks.branches import conv_bn
from repblocks.blocks.registry import register_block, resolve_block
from repblocks.blocks.spec import ConvSpec, Geometry
from repblocks.errors import ConfigurationError
from repblocks.fusion import Sum
from repblocks.fusion.geometry import Pair
from repblocks.names import known_name


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
        identity: Literal["auto", "always", "never"] = "auto",
        **geometry: Unpack[Geometry],
    ) -> None:
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        known_name("identity", identity, ("auto", "always", "never"))
        if identity == "always" and not spec.keeps_the_map:
            raise ConfigurationError(f'{spec} changes the shape of the map, so no identity fits; use identity="auto"')
        branches: dict[str, nn.Module] = {"kxk": conv_bn(spec), "pointwise": conv_bn(spec, (1, 1))}
        if identity != "never" and spec.keeps_the_map:
            branches["identity"] = nn.BatchNorm2d(out_channels)
        super().__init__(Sum(branches))


class RepVGGBlock(RepBlock):
    """``act(se(conv(x)))``: a linear block, optional squeeze-and-excitation after its sum, an activation.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.
        block: Short name of the linear block in ``BLOCKS``.
        se_layer: Makes the squeeze-and-excitation from ``out_channels``; None for none.
        act_layer: Makes the activation.

    Source: Ding et al. 2021, "RepVGG", https://arxiv.org/abs/2101.03697, section 3.3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        *,
        block: str = "repvgg",
        se_layer: Callable[[int], nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        **geometry: Unpack[Geometry],
    ) -> None:
        super().__init__()
        self.conv = resolve_block(block)(in_channels, out_channels, kernel_size, **geometry)
        self.se = None if se_layer is None else se_layer(out_channels)
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""
        x = self.conv(x)
        return self.act(x if self.se is None else self.se(x))
