"""RepNeXt's downsampling layer: a BatchNorm in front of its convolution."""

from functools import partial
from typing import Unpack

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import after_norm, conv
from repblocks.blocks.spec import ConvSpec, Geometry, Pair


class BNConv(RepConv):
    """BatchNorm, then convolution (paradigm 8).

    Zero padding surrounds the normalised map by BatchNorm's image of zero, so that it folds at the border too; the
    other modes repeat normalised pixels.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``, with a stride of 2 by default;
            ``padding=None`` pads below and to the right just enough for ``size / stride`` output pixels.

    Source: seed of the project, RepNeXt-U3's ``downsample_layers``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Pair = 2, **geometry: Unpack[Geometry]
    ) -> None:
        geometry.setdefault("stride", 2)
        if geometry.get("padding") is None:
            unpadded = ConvSpec.of(in_channels, out_channels, kernel_size, **{**geometry, "padding": 0})
            geometry["padding"] = _just_enough(unpadded)
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        super().__init__(after_norm(spec, partial(conv, bias=True)))


def _just_enough(spec: ConvSpec) -> tuple[Pair, Pair]:
    below, right = (
        max(d * (k - 1) + 1 - s, 0) for d, k, s in zip(spec.dilation, spec.kernel_size, spec.stride, strict=True)
    )
    return (0, below), (0, right)
