"""RepVGG's layer around any linear block: squeeze-and-excitation after the sum, then an activation."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from repblocks.blocks.base import RepBlock
from repblocks.blocks.registry import resolve_block
from repblocks.fusion.geometry import Pair


class RepVGGBlock(RepBlock):
    """``act(se(conv(x)))``: a linear block, optional squeeze-and-excitation after its sum, an activation.

    Args:
        in_channels, out_channels, kernel_size: As in ``nn.Conv2d``.
        block: Short name of the linear block in ``BLOCKS``.
        se_layer: Makes the squeeze-and-excitation from ``out_channels``; None for none.
        act_layer: Makes the activation.
        options: ``nn.Conv2d``'s further arguments, ``padding=None`` keeps the grid; and what the linear block takes
            beyond them.

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
        **options: Any,
    ) -> None:
        super().__init__()
        self.conv = resolve_block(block)(in_channels, out_channels, kernel_size, **options)
        self.se = None if se_layer is None else se_layer(out_channels)
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""
        x = self.conv(x)
        return self.act(x if self.se is None else self.se(x))
