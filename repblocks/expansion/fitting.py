"""One convolution in the geometry of another, where both are the same function of a smaller kernel."""

import torch
from torch import Tensor

from repblocks.errors import FoldError
from repblocks.fusion import AffineConv


def fitted(value: AffineConv, geometry: AffineConv) -> Tensor:
    """The kernel of a value in the geometry of another convolution, without zero taps around and between its taps.

    Raises:
        FoldError: The value reads other pixels, or writes another grid.
    """
    taps = [_taps(value, geometry, dim) for dim in (0, 1)]
    same_mode = value.padding_mode == geometry.padding_mode or not (value.pads or geometry.pads)
    if value.stride != geometry.stride or value.groups != geometry.groups or not same_mode or None in taps:
        raise FoldError(f"got {value!r}; needed the geometry of {geometry!r}")
    rows, columns = (torch.tensor(found) for found in taps)
    kernel = value.weight.index_select(2, rows).index_select(3, columns)
    if kernel.count_nonzero() != value.weight.count_nonzero():
        raise FoldError(f"{value!r} reads pixels that {geometry!r} does not")
    return kernel


def _taps(value: AffineConv, geometry: AffineConv, dim: int) -> list[int] | None:
    """Where in the value's kernel the taps of the geometry are; None if there are none, or the grids differ."""
    offsets, wanted = (
        [tap * conv.dilation[dim] - conv.padding[dim][0] for tap in range(conv.kernel_size[dim])]
        for conv in (value, geometry)
    )
    grids = {sum(conv.padding[dim]) - conv.reach[dim] for conv in (value, geometry)}
    fits = len(grids) == 1 and set(wanted) <= set(offsets)
    return [offsets.index(offset) for offset in wanted] if fits else None


def deviation(expected: AffineConv, got: AffineConv) -> float:
    """Largest difference of kernels and biases, relative to the largest number in the expected ones.

    Raises:
        FoldError: They differ in geometry.
    """
    pairs = [(expected.weight, fitted(got, expected)), (bias_of(expected), bias_of(got))]
    absolute = max((a - b).abs().max().item() for a, b in pairs)
    scale = max(a.abs().max().item() for a, _ in pairs)
    return absolute / scale if scale else absolute


def bias_of(value: AffineConv) -> Tensor:
    """The bias, zeros where there is none."""
    return value.weight.new_zeros(value.out_channels) if value.bias is None else value.bias
