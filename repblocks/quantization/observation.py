"""Sums over what one layer reads and gives, in two passes over the images: ranges, then what rounding does."""

import math

import torch
from torch import Tensor

from repblocks.quantization.layers import Layer, by_channel, with_weight
from repblocks.quantization.rounding import decibel, rounded_activations, rounded_by_channel


class Observed:
    """A layer, watched.

    Args:
        layer: In float, without hooks yet; its weights are read once.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        weight = layer.weight.detach()
        self.added_by_rounding = with_weight(layer, rounded_by_channel(weight) - weight)
        self.calls = 0
        self.input_low = self.output_low = math.inf
        self.input_high = self.output_high = -math.inf
        self.input_power = self.input_noise = self.output_noise = 0.0
        self.output_sum = self.output_power = self.shift_sum = torch.zeros(len(layer.weight), dtype=torch.float64)
        self.positions = 0

    def see_range(self, x: Tensor, output: Tensor) -> None:
        """The first pass."""
        self.calls += 1
        self.input_low, self.input_high = min(self.input_low, x.min().item()), max(self.input_high, x.max().item())
        self.output_low = min(self.output_low, output.min().item())
        self.output_high = max(self.output_high, output.max().item())

    def see_error(self, x: Tensor, output: Tensor) -> None:
        """The second pass: what rounding the inputs adds to them, and what rounding the weights adds to the outputs."""
        rounded = rounded_activations(x, self.input_low, self.input_high)
        self.input_power += x.double().square().sum().item()
        self.input_noise += (rounded - x).double().square().sum().item()
        self.see_weights(x, output)

    def see_weights(self, x: Tensor, output: Tensor) -> None:
        """Only what rounding the weights adds to the outputs; needs no first pass."""
        added = by_channel(self.layer, self.added_by_rounding(x)).double()
        exact = by_channel(self.layer, output).double()
        self.output_noise += added.square().sum().item()
        self.shift_sum = self.shift_sum + added.sum(1)
        self.output_sum = self.output_sum + exact.sum(1)
        self.output_power = self.output_power + exact.square().sum(1)
        self.positions += exact.shape[1]

    def input_sqnr_db(self) -> float:
        """Of what it reads, with one scale for all channels."""
        return decibel(self.input_power, self.input_noise)

    def output_sqnr_db(self) -> float:
        """Of what it gives with rounded weights."""
        return decibel(self.output_power.sum().item(), self.output_noise)

    def shift(self) -> Tensor:
        """``E[Q(W) x] - E[W x]`` per output channel; 0 for a layer that was not called."""
        return self.shift_sum / max(self.positions, 1)

    def relative_shift(self) -> Tensor:
        """The magnitude of `shift` over the standard deviation of the whole output."""
        numbers = max(self.positions * len(self.shift_sum), 1)
        variance = self.output_power.sum() / numbers - (self.output_sum.sum() / numbers).square()
        deviation = variance.clamp(min=0).sqrt()
        return self.shift().abs() / torch.where(deviation > 0, deviation, 1.0)
