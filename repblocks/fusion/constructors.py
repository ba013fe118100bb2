"""Values from scratch and from single modules: identity, dirac, average, scale, BatchNorm, pooling, linear."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # base of every BatchNorm

from repblocks.errors import FoldError
from repblocks.fusion.affine_conv import AffineConv

AvgPoolNd = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d


def identity(
    channels: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> AffineConv:
    """The unit of ``compose``: ``identity(channels)(x) == x``, without spatial dims."""
    return scale(torch.ones(channels, dtype=dtype, device=device))


def dirac(
    channels: int, kernel_size: Sequence[int], groups: int = 1, *, dtype: torch.dtype | None = None
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
    weight = torch.zeros(channels, channels // groups, *kernel_size, dtype=dtype)
    out = torch.arange(channels)
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


def from_batch_norm(bn: _BatchNorm) -> AffineConv:
    """BatchNorm by its running statistics: a scale ``gamma / sqrt(var + eps)`` and a shift per channel.

    Raises:
        FoldError: The module has no running statistics, so that its output depends on the batch.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167; paradigms 1 and 8.
    """
    mean, variance = bn.running_mean, bn.running_var
    if mean is None or variance is None:
        raise FoldError(
            f"{bn!r} has no running statistics, so it normalises by each batch and is not a convolution; "
            "train it with track_running_stats=True"
        )
    return normalisation(bn, mean, variance)


def normalisation(bn: _BatchNorm, mean: Tensor, variance: Tensor) -> AffineConv:
    """BatchNorm by given statistics, each ``[channels]``: ``(x - mean) / sqrt(variance + eps) * weight + bias``."""
    gamma = torch.rsqrt(variance + bn.eps)
    if bn.weight is not None:  # pyright: ignore[reportUnnecessaryComparison]  # None without affine parameters
        gamma = bn.weight * gamma
    shift = -mean * gamma
    if bn.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
        shift = bn.bias + shift
    return AffineConv(weight=gamma.unsqueeze(1), bias=shift, groups=len(gamma))


def from_pool(pool: AvgPoolNd, channels: int, *, dtype: torch.dtype | None = None) -> AffineConv:
    """Average pooling as a depthwise convolution (paradigm 7).

    Raises:
        FoldError: The divisor changes at the border (``count_include_pad=False`` with padding), or
            ``ceil_mode`` may add windows that reach past the input.
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
    return replace(window, stride=stride, padding=tuple((p, p) for p in sides))


def _per_dim(size: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (size,) * rank if isinstance(size, int) else tuple(size) * (rank // len(size))


def from_linear(fc: nn.Linear) -> AffineConv:
    """A linear layer over ``[N, in_features]`` as a map over channels: a pointwise conv once promoted (paradigm 9)."""
    return AffineConv(weight=fc.weight, bias=fc.bias)


def to_linear(conv: AffineConv) -> nn.Linear:
    """A pointwise convolution as a linear layer over the channels (paradigm 9).

    Raises:
        FoldError: The kernel has more than one tap, or the convolution strides or pads.
    """
    module = conv.flatten().to_module()
    assert isinstance(module, nn.Linear)
    return module
