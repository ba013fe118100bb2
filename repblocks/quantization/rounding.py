"""What int8 does to numbers: the arithmetic of ONNX Runtime's static quantization, in tensors of any dtype."""

import math

import torch
from torch import Tensor

WEIGHT_STEPS = 127
"""Steps to either side of 0: int8 without -128, so that the range is symmetric."""
ACTIVATION_STEPS = 255
"""Steps from the smallest to the largest activation, one scale for the whole tensor."""
MOST_DECIBEL = 150.0


def rounded_by_channel(weight: Tensor) -> Tensor:
    """The weights that int8 can hold with one scale per output channel: ``round(w / s) * s``, ``s = max|w| / 127``.

    Args:
        weight: ``[out_channels, ...]``.

    Source: Krishnamoorthi 2018, https://arxiv.org/abs/1806.08342, section 3.1.
    """
    return _rounded(weight, weight.abs().flatten(1).amax(1))


def rounded_as_a_whole(weight: Tensor) -> Tensor:
    """The weights that int8 can hold with one scale for all of them."""
    return _rounded(weight, weight.abs().amax().expand(len(weight)))


def _rounded(weight: Tensor, largest: Tensor) -> Tensor:
    scale = (largest / WEIGHT_STEPS).view(-1, *(1,) * (weight.ndim - 1))
    return torch.where(scale > 0, (weight / scale).round() * scale, 0.0)


def rounded_activations(x: Tensor, low: float, high: float) -> Tensor:
    """The activations that uint8 can hold between ``low`` and ``high``, which are widened to include 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return torch.zeros_like(x)
    scale = (high - low) / ACTIVATION_STEPS
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, ACTIVATION_STEPS).sub(zero) * scale


def decibel(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two powers, between -150 and 150: float32 tells no more from exact."""
    if signal == 0 or noise == 0:
        return MOST_DECIBEL if noise == 0 else -MOST_DECIBEL
    return min(max(10 * math.log10(signal / noise), -MOST_DECIBEL), MOST_DECIBEL)


def sqnr_db(exact: Tensor, rounded: Tensor) -> float:
    """Signal-to-quantization-noise ratio in decibel: ``10 log10(sum x**2 / sum (x - q)**2)``; 6 dB is a factor of 2."""
    return decibel(exact.square().sum().item(), (exact - rounded).square().sum().item())
