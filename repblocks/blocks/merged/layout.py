"""Maps as matrices of pixels, without a copy where channels are last in memory."""

import functools
import operator
from collections.abc import Callable, Sequence
from itertools import repeat

import torch
from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N * H * W, C]``: a view where channels are last in memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def empty_map(like: Tensor, channels: int) -> Tensor:
    """A map of the size of another one, channels last in memory."""
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def sampled(x: Tensor, steps: Sequence[int]) -> Tensor:
    """Every so many rows and columns of ``[N, C, H, W]``: what a pointwise convolution of that stride reads."""
    return x if tuple(steps) == (1, 1) else x[:, :, :: steps[0], :: steps[1]]


def spread(pixels: Tensor, steps: Sequence[int], like: Tensor) -> Tensor:
    """The transpose of `sampled`: pixels of a map like another one, zeros between them."""
    if tuple(steps) == (1, 1):
        return pixels
    whole = torch.zeros_like(like, dtype=pixels.dtype)
    sampled(whole, steps).copy_(pixels)
    return whole


_CACHE_BYTES = 4e6
"""Of the maps that a pass works on at a time."""


def parts_of(*maps: Tensor) -> list[slice]:
    """Slices of a batch whose maps fit into a cache together: passes over them cost less than passes over all."""
    bytes_per_image = sum(f.nbytes for f in maps) / len(maps[0])
    images = max(round(_CACHE_BYTES / bytes_per_image), 1)
    if images >= len(maps[0]):
        return [slice(None)]
    return [slice(start, start + images) for start in range(0, len(maps[0]), images)]


def convolution_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias of a 2d convolution, of which only the wanted ones are calculated."""
    transposed, output_padding, bias_sizes = False, (0, 0), [len(weight)]
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    return torch.ops.aten.convolution_backward(dy, x, weight, bias_sizes, *geometry, wanted)


def in_parts(convolve: Callable[[Tensor], list[Tensor]], x: Tensor) -> list[Tensor]:
    """``convolve(x)``, a few images at a time: depthwise convolutions are several times faster within the cache."""
    whole: list[Tensor] = []
    for part in parts_of(x, x):
        pairs = zip(whole or repeat(None), convolve(x[part]), strict=False)
        whole = [put(before, part, some, len(x)) for before, some in pairs]
    return whole


def put(whole: Tensor | None, part: slice, some: Tensor, images: int) -> Tensor:
    """Put what belongs to a part of a batch into the whole, which is laid out like it; a sole part is the whole."""
    if part == slice(None):
        return some
    if whole is None:
        last = some.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        shape = (images, *some.shape[1:])
        whole = torch.empty(shape, dtype=some.dtype, device=some.device, memory_format=layout)
    whole[part] = some
    return whole


def added(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum."""
    return functools.reduce(operator.add, tensors)


_BLOCK = 64
"""Columns of a symmetric product at a time: wide enough for a fast product, narrow enough to leave half of it out."""


def add_symmetric_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add the lower triangle of ``a^T b``, which is known to be symmetric, to ``[P, P]``; `mirrored` completes it."""
    for start in range(0, len(total), _BLOCK):
        end = start + _BLOCK
        total[start:end, :end].addmm_(a[:, start:end].t(), b[:, :end])
    return total


def mirrored(lower: Tensor) -> Tensor:
    """A symmetric matrix from its lower triangle, whatever stands above."""
    return lower.tril() + lower.tril(-1).t()
