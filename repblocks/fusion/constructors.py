"""Values from scratch and from single modules: identity, dirac, average, scale, BatchNorm, pooling, linear."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # base of every BatchNorm

from repblocks.errors import FoldError
from repblocks.fusion.affine_conv import AffineConv
from repblocks.fusion.kernels import compose, ungroup

AvgPoolNd = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d
AdaptiveAvgPoolNd = nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d


def identity(
    channels: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> AffineConv:
    """The unit of ``compose``: ``identity(channels)(x) == x``, without spatial dims."""
    return scale(torch.ones(channels, dtype=dtype, device=device))


def dirac(
    channels: int,
    kernel_size: Sequence[int],
    groups: int = 1,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> AffineConv:
    """The identity as a kernel: ``dirac(channels, kernel_size, groups)(x) == x``, padded to keep the grid.

    The one stands at tap ``kernel_size // 2``, on the diagonal of each group: ``[channels, channels / groups,
    *kernel_size]``.

    Raises:
        FoldError: ``groups`` does not divide ``channels``.

    Source: seed of the project, "Shortcut re-parameterization", 6a.
    """
    if groups < 1 or channels % groups:
        raise FoldError(f"groups={groups} must be positive and divide the {channels} channels of a dirac kernel")
    weight = torch.zeros(channels, channels // groups, *kernel_size, dtype=dtype, device=device)
    out = torch.arange(channels, device=device)
    weight[(out, out % (channels // groups), *(k // 2 for k in kernel_size))] = 1
    padding = tuple((k // 2, (k - 1) - k // 2) for k in kernel_size)
    return AffineConv(weight=weight, padding=padding, groups=groups)


def average(channels: int, kernel_size: Sequence[int], *, dtype: torch.dtype | None = None) -> AffineConv:
    """The mean over a window, stride 1, unpadded: depthwise ``[channels, 1, *kernel_size]`` of ``1 / taps``."""
    value = 1 / math.prod(kernel_size)
    return AffineConv(weight=torch.full((channels, 1, *kernel_size), value, dtype=dtype), groups=channels)


def scale(gamma: Tensor) -> AffineConv:
    """A factor per channel, as layer scale does: ``scale(gamma)(x) == gamma * x``, ``gamma`` of ``[channels]``.

    Raises:
        FoldError: ``gamma`` is not one-dimensional.
    """
    if gamma.ndim != 1:
        raise FoldError(f"got a scale of shape {tuple(gamma.shape)}; needed [channels]: call flatten() on it")
    return AffineConv(weight=gamma.unsqueeze(1), groups=len(gamma))


def from_batch_norm(bn: _BatchNorm, kernel_size: Sequence[int] = (), *, groups: int | None = None) -> AffineConv:
    """BatchNorm by its running statistics: a scale ``gamma / sqrt(var + eps)`` and a shift per channel.

    Args:
        bn: Any BatchNorm, over ``[N, channels, ...]``.
        kernel_size: Of the convolution, odd or even, padded to keep the grid; ``()`` gives a map without spatial dims.
        groups: Of the convolution; None makes it depthwise.

    Raises:
        FoldError: The module has no running statistics, so that its output depends on the batch; or ``groups`` does not
            divide the channels.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167; seed 001, paradigms 1 and 8.
    """
    mean, variance = bn.running_mean, bn.running_var
    if mean is None or variance is None:
        raise FoldError(
            f"{bn!r} has no running statistics, so it normalises by each batch and is not a convolution; "
            "train it with track_running_stats=True"
        )
    value = normalisation(bn, mean, variance)
    if not kernel_size and groups is None:
        return value
    kept = value.groups if groups is None else groups
    tap = dirac(value.in_channels, kernel_size, kept, dtype=value.weight.dtype, device=value.weight.device)
    return compose(tap, value)


def normalisation(bn: _BatchNorm, mean: Tensor, variance: Tensor) -> AffineConv:
    """BatchNorm by given statistics, each ``[channels]``: ``(x - mean) / sqrt(variance + eps) * weight + bias``."""
    return normalised(mean, variance, bn.weight, bn.bias, bn.eps)


def normalised(mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> AffineConv:
    """As `normalisation`, from the tensors; weight and bias are None without affine parameters."""
    gamma = torch.rsqrt(variance + eps)
    if weight is not None:
        gamma = weight * gamma
    shift = -mean * gamma
    if bias is not None:
        shift = bias + shift
    return AffineConv(weight=gamma.unsqueeze(1), bias=shift, groups=len(gamma))


def from_pool(
    pool: AvgPoolNd, channels: int, *, groups: int | None = None, dtype: torch.dtype | None = None
) -> AffineConv:
    """Average pooling as a convolution: ``from_pool(pool, channels)(x) == pool(x)`` (seed 001, paradigm 7).

    Args:
        pool: Of any kernel size, stride and padding.
        channels: Of its input.
        groups: Of the convolution; None makes it depthwise, 1 dense.
        dtype: Of the kernel.

    Raises:
        FoldError: The divisor changes at the border (``count_include_pad=False`` with padding), ``ceil_mode`` may
            add windows that reach past the input, or ``groups`` does not divide the channels.
    """
    rank = 1 if isinstance(pool, nn.AvgPool1d) else 2 if isinstance(pool, nn.AvgPool2d) else 3
    sides, stride = _per_dim(pool.padding, rank), _per_dim(pool.stride, rank)
    divisor = None if isinstance(pool, nn.AvgPool1d) else pool.divisor_override
    if any(sides) and not pool.count_include_pad and not divisor:
        raise FoldError(f"{pool!r} divides by fewer pixels at the border; set count_include_pad=True or padding=0")
    if pool.ceil_mode and any(s > 1 for s in stride):
        raise FoldError(f"{pool!r} may add windows that reach past the input; set ceil_mode=False")
    window = average(channels, _per_dim(pool.kernel_size, rank), dtype=dtype)
    if divisor:
        window = replace(window, weight=torch.full_like(window.weight, 1 / divisor))
    window = replace(window, stride=stride, padding=tuple((p, p) for p in sides))
    return window if groups is None else ungroup(window, groups)


def from_adaptive_pool(
    pool: AdaptiveAvgPoolNd, channels: int, input_size: Sequence[int], *, dtype: torch.dtype | None = None
) -> AffineConv:
    """Adaptive average pooling of one input size as a depthwise convolution (seed 001, paradigm 7).

    Global average pooling is a kernel over the whole input: ``[channels, 1, *input_size]``. Linear after it is
    ``compose(from_adaptive_pool(pool, fc.in_features, input_size), from_linear(fc))``.

    Args:
        pool: Of any output size.
        channels: Of its input.
        input_size: Spatial dims of its input.
        dtype: Of the kernel.

    Raises:
        FoldError: The windows differ in size or step, as where the output size does not divide the input's.
    """
    size = tuple(input_size)
    wanted = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * len(size)
    if len(wanted) != len(size):
        raise FoldError(f"got input_size={size} for {pool!r}; needed {len(wanted)} spatial dims")
    windows = [_adaptive_window(n, n if out is None else out) for n, out in zip(size, wanted, strict=True)]
    if any(len(window) > 1 for window in windows):
        raise FoldError(f"{pool!r} averages windows that differ over an input of {size}; choose sizes that divide")
    widths, steps = zip(*(window.pop() for window in windows), strict=True)
    return replace(average(channels, widths, dtype=dtype), stride=steps)


def _adaptive_window(size: int, count: int) -> set[tuple[int, int]]:
    """Every ``(width, step)`` among torch's ``count`` windows over ``size`` pixels."""
    starts = [i * size // count for i in range(count)]
    ends = [-(-(i + 1) * size // count) for i in range(count)]
    steps = [b - a for a, b in itertools.pairwise(starts)] or [1]
    return {(end - start, step) for start, end in zip(starts, ends, strict=True) for step in steps}


def _per_dim(size: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (size,) * rank if isinstance(size, int) else tuple(size) * (rank // len(size))


def from_linear(fc: nn.Linear) -> AffineConv:
    """A linear layer over ``[N, in_features]`` as a map over channels: a pointwise conv once promoted.

    ``from_linear(fc)(x) == fc(x)`` (seed 001, paradigm 9).
    """
    return AffineConv(weight=fc.weight, bias=fc.bias)


def from_flattened_linear(fc: nn.Linear, input_size: Sequence[int]) -> AffineConv:
    """A linear layer behind ``nn.Flatten`` as a convolution that covers its input (seed 001, paradigm 9).

    ``from_flattened_linear(fc, size)(x).flatten(1) == fc(x.flatten(1))`` for ``x`` of ``[N, channels, *size]``: the
    kernel is as large as the input and writes one pixel. On larger inputs it slides.

    Raises:
        FoldError: ``in_features`` is not a number of channels times the pixels of ``input_size``.
    """
    size = tuple(input_size)
    if any(n < 1 for n in size) or fc.in_features % math.prod(size):
        raise FoldError(
            f"{fc!r} does not read whole channels of {size}; needed the positive spatial dims before nn.Flatten"
        )
    return AffineConv(weight=fc.weight.unflatten(1, (-1, *size)), bias=fc.bias)


def to_linear(conv: AffineConv) -> nn.Linear:
    """A pointwise convolution as a linear layer over the channels (paradigm 9).

    Raises:
        FoldError: The kernel has more than one tap, or the convolution strides, pads or is transposed.
    """
    module = conv.promote(conv.rank).flatten().to_module()
    assert isinstance(module, nn.Linear)
    return module
