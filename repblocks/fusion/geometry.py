"""Kernel windows: inserting zeros between taps and around them, on plain tensors and numbers."""

import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def insert_zeros(weight: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Spread the taps of ``[O, I, *kernel]`` apart: tap ``i`` moves to ``i * factor``, zeros between."""
    if all(factor == 1 for factor in factors):
        return weight
    spread = weight.new_zeros(
        *weight.shape[:2], *((k - 1) * f + 1 for k, f in zip(weight.shape[2:], factors, strict=True))
    )
    spread[(..., *(slice(None, None, factor) for factor in factors))] = weight
    return spread


def surround(weight: Tensor, taps: tuple[Pair, ...]) -> Tensor:
    """Add ``(before, after)`` zero taps per spatial dim to ``[O, I, *kernel]``."""
    return weight if not any(map(any, taps)) else F.pad(weight, flat_padding(taps))


def flat_padding(padding: tuple[Pair, ...]) -> list[int]:
    """``(before, after)`` per dim in the order ``F.pad`` wants: last dim first."""
    return [amount for pair in reversed(padding) for amount in pair]


def reach(kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """Distance from the first tap to the last, ``dilation * (kernel_size - 1)``, per dim."""
    return tuple(d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True))
