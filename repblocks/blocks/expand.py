"""ExpandNets: a convolution over-parameterized as a chain of linear ones."""

from dataclasses import replace
from itertools import zip_longest
from typing import Literal, Unpack

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv, pointwise
from repblocks.blocks.registry import register_block
from repblocks.blocks.spec import ConvSpec, Geometry, Pair
from repblocks.names import known_name


@register_block("expand")
class ExpandConv(RepConv):
    """``BN(1x1(kxk(1x1(x))))``, or ``BN(3x3(..3x3(x)))`` whose kernels make up one of kxk; nothing between them.

    Args:
        in_channels, out_channels, kernel_size, geometry: As in ``nn.Conv2d``; ``padding=None`` keeps the grid.
        chain: "pointwise" (the paper's CL) or "kernels" (its CK, where the first pads for all and the last strides).
        expansion: Channels inside the chain, relative to those of its input, behind the kxk of its output.

    Raises:
        ConfigurationError: An unknown chain.

    Source: Guo et al. 2020, "ExpandNets", https://arxiv.org/abs/1811.10495, section 3; seed 000.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        *,
        chain: Literal["pointwise", "kernels"] = "pointwise",
        expansion: int = 4,
        **geometry: Unpack[Geometry],
    ) -> None:
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
        links = _CHAINS[known_name("chain", chain, _CHAINS)](spec, expansion)
        super().__init__(nn.Sequential(*links, nn.BatchNorm2d(out_channels)))


def _with_pointwise(spec: ConvSpec, expansion: int) -> list[nn.Conv2d]:
    wide = replace(spec, in_channels=expansion * spec.in_channels, out_channels=expansion * spec.out_channels)
    after = replace(spec, in_channels=wide.out_channels)
    return [pointwise(spec, wide.in_channels), conv(wide), pointwise(after, spec.out_channels)]


def _of_kernels(spec: ConvSpec, expansion: int) -> list[nn.Conv2d]:
    pairs = zip_longest(*map(_steps, spec.kernel_size), fillvalue=1)
    sizes: list[Pair] = [(height, width) for height, width in pairs]
    wide, last, links = expansion * spec.in_channels, len(sizes) - 1, []
    for i, size in enumerate(sizes):
        link = replace(spec, kernel_size=size, in_channels=wide if i else spec.in_channels)
        link = replace(link, padding=((0, 0), (0, 0))) if i else link
        links.append(conv(link if i == last else replace(link, out_channels=wide, stride=(1, 1))))
    return links


def _steps(size: int) -> list[int]:
    """Kernels of 3, and a last one of 2 for an even size, that reach as far as one of this size."""
    return [3] * ((size - 1) // 2) + [2] * ((size - 1) % 2) or [1]


_CHAINS = {"pointwise": _with_pointwise, "kernels": _of_kernels}
