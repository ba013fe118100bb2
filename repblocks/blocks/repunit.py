"""RepUnit: the depthwise unit of RepNeXt."""

from collections.abc import Sequence
from typing import Literal, Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv, conv_bn
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.errors import ConfigurationError
from repblocks.fusion import SplitConcat, Sum
from repblocks.names import known_name

_EPS = 1e-6  # of the published unit's BatchNorms, whose weights would mean something else with another one


@register_block("repunit")
class RepUnit(RepConv):
    """Several kernel shapes over one map: 7x7 + 1x5 + 3x1, each with its BatchNorm, depthwise unless told otherwise.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid;
            ``groups`` is ``in_channels`` by default.
        kernel_sizes: By default k x k, 1 x (k-2), (k-4) x 1 for the sum; squares of k, k-2, k-4 for the split.
        merge: "sum" adds branches; "split" gives each its own part of the channels, with one BatchNorm at the end.

    Raises:
        ConfigurationError: ``merge="split"`` that is not depthwise, or has fewer channels than kernels.

    Source: seed of the project, RepNeXt-U3's ``stages.*.feature``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | Pair = 7,
        *,
        kernel_sizes: Sequence[Pair] | None = None,
        merge: Literal["sum", "split"] = "sum",
        **geometry: Unpack[Geometry],
    ) -> None:
        geometry.setdefault("groups", in_channels)
        spec = ConvSpec.of(in_channels, out_channels or in_channels, kernel_size, **geometry)
        sizes = kernel_sizes or (spec.kernel_size, (1, spec.shrunk(2)[1]), (spec.shrunk(4)[0], 1))
        summed = known_name("merge", merge, ("sum", "split")) == "sum"
        added = Sum([conv_bn(spec, size, eps=_EPS) for size in sizes])
        super().__init__(added if summed else _split(spec, kernel_sizes))


def _split(spec: ConvSpec, kernel_sizes: Sequence[Pair] | None) -> nn.Module:
    sizes = kernel_sizes or [spec.shrunk(by) for by in (0, 2, 4)]
    if not spec.is_depthwise or spec.in_channels < len(sizes):
        raise ConfigurationError(f'{spec} does not split over {len(sizes)} depthwise kernels; use merge="sum"')
    widths = [len(range(i, spec.in_channels, len(sizes))) for i in range(len(sizes))]
    parts = [conv(spec.depthwise(channels), size) for channels, size in zip(widths, sizes, strict=True)]
    return nn.Sequential(SplitConcat(parts, widths), nn.BatchNorm2d(spec.out_channels, _EPS))
