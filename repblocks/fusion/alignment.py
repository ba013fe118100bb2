"""Several kernels over one input: what they must share, and the window of taps that holds them all."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repblocks.errors import FoldError
from repblocks.fusion.affine_conv import AffineConv, PaddingMode
from repblocks.fusion.geometry import Pair


def unified(verb: str, convs: Sequence[AffineConv]) -> list[AffineConv]:
    """One rank and one dtype: maps without spatial dims take the rank of the others.

    Raises:
        FoldError: There are none, or two have different numbers of spatial dims.
    """
    if not convs:
        raise FoldError(f"{verb} needs at least one convolution")
    rank = max(conv.rank for conv in convs)
    dtype = functools.reduce(torch.promote_types, (conv.weight.dtype for conv in convs))
    return [conv.promote(rank).to(dtype=dtype) for conv in convs]


def require_same(verb: str, convs: Sequence[AffineConv], what: str, read: Callable[[AffineConv], object]) -> None:
    """Check that ``read`` gives the same for all.

    Raises:
        FoldError: It does not; the message names ``what`` differs.
    """
    if len({read(conv) for conv in convs}) > 1:
        listed = ", ".join(map(repr, convs))
        raise FoldError(f"cannot {verb} {listed}: {what} differ; every branch needs the same {what}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The taps on which the kernels of all branches lie, in fields named as those of `AffineConv`."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[Pair, ...]
    dilation: tuple[int, ...]
    padding_mode: PaddingMode

    @classmethod
    def over(cls, verb: str, convs: Sequence[AffineConv]) -> "Window":
        """The narrowest window over kernels, aligned by where their taps read (not by their centres).

        Raises:
            FoldError: Strides, padding modes or output grids differ.
        """
        require_same(verb, convs, "stride", lambda conv: conv.stride)
        require_same(verb, convs, "output grids (padding - dilation * (kernel_size - 1))", _grid)
        padded = [conv for conv in convs if conv.pads]
        require_same(verb, padded, "padding_mode", lambda conv: conv.padding_mode)
        dilation = tuple(_common_dilation(convs, dim) for dim in range(convs[0].rank))
        padding = tuple(_widest_padding(convs, dim) for dim in range(convs[0].rank))
        sizes = zip(padding, _grid(convs[0]), dilation, strict=True)
        return cls(
            kernel_size=tuple((sum(sides) - grid) // d + 1 for sides, grid, d in sizes),
            stride=convs[0].stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padded[0].padding_mode if padded else "zeros",
        )

    def conv(self, weight: Tensor, bias: Tensor | None, groups: int) -> AffineConv:
        """The convolution with this window."""
        return AffineConv(
            weight=weight,
            bias=bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=groups,
            padding_mode=self.padding_mode,
        )

    def kernel(self, convs: Sequence[AffineConv], groups: int) -> Tensor:
        """The sum of kernels in ``groups`` groups, ``[O, I / groups, *kernel_size]``.

        Each is added where its taps and groups lie; none is padded or made dense on its own.
        """
        shape = (convs[0].out_channels, convs[0].in_channels // groups, *self.kernel_size)
        base = next((conv for conv in convs if conv.weight.shape == shape), None)
        total = convs[0].weight.new_zeros(shape) if base is None else base.weight.clone()
        for conv in convs:
            if conv is not base:
                blocks = conv.weight.unflatten(0, (groups, conv.groups // groups, -1))
                self._place_of(conv, total, groups).add_(blocks.movedim(1, -1))
        return total

    def _place_of(self, conv: AffineConv, total: Tensor, groups: int) -> Tensor:
        """The entries that a narrower or more grouped kernel fills: ``[groups, O, I, *kernel_size, merged groups]``."""
        merged = conv.groups // groups
        taps = total[(..., *(self._taps_of(conv, dim) for dim in range(conv.rank)))]
        blocks = taps.unflatten(1, (merged, -1)).unflatten(0, (groups, merged, -1))
        return blocks.diagonal(dim1=1, dim2=3)

    def _taps_of(self, conv: AffineConv, dim: int) -> slice:
        taps = conv.kernel_size[dim]
        start = (self.padding[dim][0] - conv.padding[dim][0]) // self.dilation[dim]
        step = conv.dilation[dim] // self.dilation[dim] if taps > 1 else 1
        return slice(start, start + (taps - 1) * step + 1, step)


def _grid(conv: AffineConv) -> tuple[int, ...]:
    """What an input side gains before striding."""
    return tuple(before + after - reach for (before, after), reach in zip(conv.padding, conv.reach, strict=True))


def _common_dilation(convs: Sequence[AffineConv], dim: int) -> int:
    """The widest spacing on which the taps of all kernels lie."""
    spacings = [conv.dilation[dim] for conv in convs if conv.kernel_size[dim] > 1]
    shifts = [conv.padding[dim][0] - convs[0].padding[dim][0] for conv in convs]
    return math.gcd(*spacings, *shifts) or 1


def _widest_padding(convs: Sequence[AffineConv], dim: int) -> Pair:
    return max(conv.padding[dim][0] for conv in convs), max(conv.padding[dim][1] for conv in convs)
