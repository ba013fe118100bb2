"""RepNeXt-M's small unit: a 3x3 kernel with its middle row, middle column and corners once more."""

from typing import Literal, Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv, serial
from repblocks.blocks.spec import ConvSpec, Geometry
from repblocks.fusion import Sum
from repblocks.names import known_name


class RepNeXtMSmallConv(RepConv):
    """``3x3 + 1x3 + 3x1 + 2x2 dilated by 2``, depthwise unless told otherwise, without a norm.

    The last one reads the corners of the 3x3 window.

    Args:
        in_channels, out_channels, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid; ``groups`` is
            ``in_channels`` by default.
        lines: "parallel" adds 1x3 and 3x1, with biases, as the network does at stride 1; "serial" runs the 3x1 after
            the 1x3, without biases, as it does at stride 2.

    Raises:
        ConfigurationError: Unknown ``lines``, or no geometry of a convolution.

    Source: Zhao et al. 2024, "RepNeXt", https://arxiv.org/abs/2406.16004, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        lines: Literal["parallel", "serial"] = "parallel",
        **geometry: Unpack[Geometry],
    ) -> None:
        known_name("lines", lines, ("parallel", "serial"))
        geometry.setdefault("groups", in_channels)
        spec = ConvSpec.of(in_channels, out_channels or in_channels, 3, **geometry)
        rows, columns = spec.dilation
        crossed: dict[str, nn.Module] = (
            {"serial": serial(spec, (3, 3))}
            if lines == "serial"
            else {"row": conv(spec, (1, 3), bias=True), "column": conv(spec, (3, 1), bias=True)}
        )
        corners = conv(spec, (2, 2), dilation=(2 * rows, 2 * columns), bias=True)
        super().__init__(Sum({"square": conv(spec, bias=True), **crossed, "corners": corners}))
