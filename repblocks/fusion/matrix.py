"""A convolution as a matrix: the products of index maps, one per dim, gathered into a sparse tensor."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from repblocks.errors import ConfigurationError, FoldError
from repblocks.fusion.affine_conv import AffineConv

Layout = Literal["csr", "coo", "dense"]
LAYOUTS: tuple[Layout, ...] = ("csr", "coo", "dense")
#: A dense matrix beyond this is refused.
DENSE_LIMIT_BYTES = 4 * 2**30


def to_matrix(conv: AffineConv, input_size: Sequence[int], *, layout: Layout = "csr") -> Tensor:
    """The matrix of a convolution: ``to_matrix(c, size) @ [vec x; 1] == vec c(x)``.

    Which entries are stored follows from the geometry alone: one for every weight that meets an input pixel, also where
    the weight happens to be zero, and none across groups, for taps in zero padding, or for the bias of a convolution
    that has none. Where reflect, replicate or circular padding lets several taps meet one pixel, they are summed.
    The result is differentiable in weight and bias, in all layouts, and has their dtype and device.

    Args:
        conv: The convolution.
        input_size: Spatial size of the input, without batch and channels; ``()`` for a map without spatial dims,
            which also takes the rank of any other size.
        layout: ``"csr"`` or ``"coo"`` (coalesced), with int64 indices sorted within rows, or ``"dense"``.

    Returns:
        ``[out_channels * prod(output_size), in_channels * prod(input_size) + 1]``, rows and columns in C order of
        ``[channels, *size]``; the last column is the bias.

    Raises:
        FoldError: The convolution is not defined on the size, or a dense matrix would take more than
            ``DENSE_LIMIT_BYTES``.
        ConfigurationError: The layout is none of the three.

    Source: seed of the project, "Conv2d parameters as a matrix".
    """
    if layout not in LAYOUTS:
        raise ConfigurationError(f"got layout={layout!r}; needed one of {', '.join(LAYOUTS)}")
    shape = matrix_shape(conv, input_size)
    if layout == "dense":
        _refuse_absurd(conv, shape)
    entries = _entries(conv.promote(len(input_size)), tuple(input_size))
    return _ASSEMBLERS[layout](entries, shape)


def matrix_shape(conv: AffineConv, input_size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of ``to_matrix(conv, input_size)``, the bias column included.

    Raises:
        FoldError: The convolution is not defined on the size.
    """
    rows = conv.out_channels * math.prod(output_size(conv, input_size))
    return rows, conv.in_channels * math.prod(input_size) + 1


def output_size(conv: AffineConv, input_size: Sequence[int]) -> tuple[int, ...]:
    """Spatial size of ``conv(x)`` for ``x`` of ``[N, in_channels, *input_size]``.

    Raises:
        FoldError: The size has another number of dims, an entry below 1, is smaller than the kernel with its padding,
            or is too small for what reflect or circular padding repeats.
    """
    if len(input_size) > 3 or conv.rank not in (0, len(input_size)):
        needed = f"{conv.rank} sizes" if conv.rank else "up to 3 sizes"
        raise FoldError(
            f"got input_size={tuple(input_size)} for {conv!r}; needed {needed}, one per spatial dim: leave out "
            "the batch and the channels"
        )
    if any(size < 1 for size in input_size):
        raise FoldError(f"got input_size={tuple(input_size)}; every size must be at least 1")
    flat = conv.promote(len(input_size))
    return tuple(_output_side(flat, dim, size) for dim, size in enumerate(input_size))


def padded_pixels(conv: AffineConv, dim: int, side: int) -> Tensor:
    """The input pixel that each pixel of a padded spatial dim repeats, ``[before + side + after]``; -1 for a zero."""
    pixels = torch.arange(side, dtype=torch.float64, device=conv.weight.device)  # F.pad repeats floating point only
    if conv.padding_mode == "zeros":
        return F.pad(pixels, conv.padding[dim], value=-1).long()
    return F.pad(pixels[None, None], conv.padding[dim], conv.padding_mode)[0, 0].long()


def _output_side(conv: AffineConv, dim: int, size: int) -> int:
    pair, reach = conv.padding[dim], conv.reach[dim]
    repeatable = {"reflect": size - 1, "circular": size}.get(conv.padding_mode, max(pair))
    if max(pair) > repeatable:
        raise FoldError(
            f"got an input of {size} pixels in spatial dim {dim} for {conv!r}; {conv.padding_mode} padding of "
            f"{max(pair)} needs at least {max(pair) + size - repeatable}: give a larger input or pad less"
        )
    if size + sum(pair) <= reach:
        raise FoldError(
            f"got an input of {size} pixels in spatial dim {dim} for {conv!r}, smaller than its kernel; needed at "
            f"least {reach + 1 - sum(pair)}: give a larger input or pad more"
        )
    return (size + sum(pair) - reach - 1) // conv.stride[dim] + 1


def _refuse_absurd(conv: AffineConv, shape: tuple[int, int]) -> None:
    size = math.prod(shape) * conv.weight.element_size()
    if size > DENSE_LIMIT_BYTES:
        raise FoldError(
            f"a dense {shape[0]} x {shape[1]} matrix of {conv!r} takes {size} bytes, more than {DENSE_LIMIT_BYTES}; "
            'use layout="csr", or linear_operator(conv, input_size), which needs no matrix'
        )


@dataclass(frozen=True, slots=True)
class _Axis:
    """What the output pixels of one spatial dim read, as ``[output side, most pixels that one of them reads]``.

    Attributes:
        pixels: Input pixels, ascending.
        columns: The kernel column that each is multiplied with.
        present: False where an output pixel reads fewer than the most.
    """

    pixels: Tensor
    columns: Tensor
    present: Tensor


@dataclass(frozen=True, slots=True)
class _Pattern:
    """The rows of one output channel, ``[output pixels, entries]``.

    Attributes:
        columns: Of the matrix, for the first group.
        sources: Where the value stands among those of the output channel.
        present: False for an entry that is not stored.
    """

    columns: Tensor
    sources: Tensor
    present: Tensor


@dataclass(frozen=True, slots=True)
class _Entries:
    """The stored entries of the matrix, row by row."""

    counts: Tensor
    columns: Tensor
    values: Tensor

    @property
    def rows(self) -> Tensor:
        """The row of each entry."""
        return torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(self.counts)


def _entries(conv: AffineConv, input_size: tuple[int, ...]) -> _Entries:
    """All rows: those of the first output channel, repeated, since the channels of a group read the same pixels."""
    axes, weight = _axes(conv, input_size)
    values = weight.flatten(1)
    pattern = _channel_pattern(axes, tuple(weight.shape[1:]), input_size, weight.device)
    if conv.bias is not None:
        pattern = _with_bias(pattern, column=conv.in_channels * math.prod(input_size), source=values.shape[1])
        values = torch.cat([values, conv.bias.unsqueeze(1)], dim=1)
    stored = pattern.present.flatten().nonzero().squeeze(1)
    columns, sources = (table.flatten().index_select(0, stored) for table in (pattern.columns, pattern.sources))
    shifts = torch.arange(conv.groups, device=weight.device) * (weight.shape[1] * math.prod(input_size))
    columns = columns + shifts[:, None] * (sources < weight[0].numel())
    return _Entries(
        counts=pattern.present.sum(1).repeat(conv.out_channels),
        columns=columns[:, None].expand(-1, conv.out_channels // conv.groups, -1).flatten().contiguous(),
        values=values.index_select(1, sources).flatten(),
    )


def _axes(conv: AffineConv, input_size: tuple[int, ...]) -> tuple[list[_Axis], Tensor]:
    """One axis per spatial dim, and the weight with a column for every sum of taps that they need."""
    weight, axes = conv.weight, list[_Axis]()
    for dim, side in enumerate(input_size):
        axis, weight = _axis(_pixels_read(conv, dim, side), side, weight, dim + 2)
        axes.append(axis)
    return axes, weight


def _pixels_read(conv: AffineConv, dim: int, side: int) -> Tensor:
    """The input pixel under each tap, ``[output side, taps]``; -1 in zero padding."""
    padded = padded_pixels(conv, dim, side)
    starts = torch.arange(0, len(padded) - conv.reach[dim], conv.stride[dim], device=padded.device)
    taps = torch.arange(conv.kernel_size[dim], device=padded.device) * conv.dilation[dim]
    return padded[starts[:, None] + taps]


def _axis(read: Tensor, side: int, weight: Tensor, dim: int) -> tuple[_Axis, Tensor]:
    """Unite the taps of an output pixel that read one input pixel; the weight gains a column for every such sum."""
    rows, taps = (read >= 0).nonzero(as_tuple=True)
    keys, key_of, taps_per_key = torch.unique(rows * side + read[rows, taps], return_inverse=True, return_counts=True)
    united = taps_per_key > 1
    columns = torch.empty_like(keys).index_put_((key_of,), taps)
    columns[united] = torch.arange(weight.shape[dim], weight.shape[dim] + int(united.sum()), device=read.device)
    shared = united[key_of]
    grown = _with_sums(weight, dim, taps[shared], columns[key_of][shared])
    return _table(keys // side, keys % side, columns, len(read)), grown


def _with_sums(weight: Tensor, dim: int, taps: Tensor, columns: Tensor) -> Tensor:
    """Append columns along ``dim``: the sums of the taps that share a column."""
    if not len(taps):
        return weight
    taken = weight.shape[dim]
    shape = list(weight.shape)
    shape[dim] = int(columns.max()) + 1 - taken
    sums = weight.new_zeros(shape).index_add(dim, columns - taken, weight.index_select(dim, taps))
    return torch.cat([weight, sums], dim=dim)


def _table(rows: Tensor, pixels: Tensor, columns: Tensor, height: int) -> _Axis:
    counts = torch.bincount(rows, minlength=height)
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    empty = rows.new_zeros(height, int(counts.max()))
    return _Axis(
        pixels=empty.index_put((rows, slots), pixels),
        columns=empty.index_put((rows, slots), columns),
        present=torch.arange(empty.shape[1], device=rows.device) < counts[:, None],
    )


def _channel_pattern(
    axes: list[_Axis], weight_size: tuple[int, ...], input_size: tuple[int, ...], device: torch.device
) -> _Pattern:
    """The product of the input channels and the axes."""
    channels = torch.arange(weight_size[0], device=device)
    pixels = _scaled([axis.pixels for axis in axes], input_size)
    taps = _scaled([axis.columns for axis in axes], weight_size[1:])
    return _Pattern(
        present=_product([axis.present for axis in axes], channels[:1] >= 0, torch.logical_and).repeat(
            1, len(channels)
        ),
        columns=_product(pixels, channels * math.prod(input_size), torch.add),
        sources=_product(taps, channels * math.prod(weight_size[1:]), torch.add),
    )


def _with_bias(pattern: _Pattern, *, column: int, source: int) -> _Pattern:
    """Append an entry to every row."""
    return _Pattern(
        present=F.pad(pattern.present, (0, 1), value=True),
        columns=F.pad(pattern.columns, (0, 1), value=column),
        sources=F.pad(pattern.sources, (0, 1), value=source),
    )


def _scaled(tables: list[Tensor], sizes: tuple[int, ...]) -> list[Tensor]:
    """Indices per dim times the dim's stride in C order."""
    return [table * math.prod(sizes[dim + 1 :]) for dim, table in enumerate(tables)]


def _product(tables: list[Tensor], channels: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine ``[outputs, slots]`` per dim with ``[channels]`` to ``[outputs, channels * slots]``, in C order."""
    rank = len(tables)
    spread = [
        table.reshape((1,) * (dim + 1) + table.shape[:1] + (1,) * rank + table.shape[1:] + (1,) * (rank - dim - 1))
        for dim, table in enumerate(tables)
    ]
    joined = functools.reduce(combine, [*spread, channels.reshape((1,) * (rank + 1) + (-1,) + (1,) * rank)])
    return joined.flatten(0, rank).flatten(1)


def _csr(entries: _Entries, shape: tuple[int, int]) -> Tensor:
    _spend_beta_warning()
    starts = F.pad(entries.counts.cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(starts, entries.columns, entries.values, shape, check_invariants=False)


@functools.cache
def _spend_beta_warning() -> None:
    """Torch warns once per process, at its first CSR tensor, that the support is in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def _coo(entries: _Entries, shape: tuple[int, int]) -> Tensor:
    indices = torch.stack([entries.rows, entries.columns])
    return torch.sparse_coo_tensor(indices, entries.values, shape, is_coalesced=True, check_invariants=False)


def _dense(entries: _Entries, shape: tuple[int, int]) -> Tensor:
    return entries.values.new_zeros(shape).index_put_((entries.rows, entries.columns), entries.values)


_ASSEMBLERS: dict[Layout, Callable[[_Entries, tuple[int, int]], Tensor]] = {"csr": _csr, "coo": _coo, "dense": _dense}
