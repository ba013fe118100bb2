"""Bias correction: rounded weights shift what a layer gives on average, and its bias can take the shift back."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repblocks.quantization.batches import Batches, image_batches
from repblocks.quantization.layers import (
    Layer,
    deploy_copy,
    like_model,
    outputs,
    watch,
    weighted_layers,
    with_rounded_weights,
)
from repblocks.quantization.observation import Observed


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectedLayer:
    """The shift that was taken back in one layer.

    Attributes:
        name: Of the layer.
        largest_shift: ``max_c |E[Q(W) x] - E[W x]| / std``, over the output channels and relative to the standard
            deviation of the layer's output.
        mean_shift: The mean over the channels instead of the largest.
    """

    name: str
    largest_shift: float
    mean_shift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionReport:
    """What `bias_corrected` did.

    Attributes:
        layers: Every layer with a bias of its own, in order.
        without_bias: Layers whose shift stays, because they have no bias, or share it with another layer.
        error_before, error_after: How far the model with rounded weights is from the float model, before and after:
            ``|a - b| / |a|`` over all outputs on the images, in Frobenius norms.
        float_change: How far the corrected model, not rounded, is from the one that was given, likewise. It is not 0:
            the correction is of use in int8 only.
        images: On which all of this was measured.
    """

    layers: Sequence[CorrectedLayer]
    without_bias: Sequence[str]
    error_before: float
    error_after: float
    float_change: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"corrected {len(self.layers)} biases on {self.images} images: error with rounded weights "
                f"{self.error_before:.2g} -> {self.error_after:.2g}, float function changed by {self.float_change:.2g}",
                *(
                    f"  {layer.name}: shift {layer.largest_shift:.2g} at most, {layer.mean_shift:.2g} on average, of "
                    "the output's standard deviation"
                    for layer in self.layers
                ),
                *(f"  {name}: has no bias of its own" for name in self.without_bias),
            ]
        )


class BiasCorrected(NamedTuple):
    """A deploy copy for int8 only, and what was done to get there."""

    model: nn.Module
    report: CorrectionReport


def bias_corrected(model: nn.Module, calibration: Batches) -> BiasCorrected:
    """A deploy copy whose biases take back what rounding the weights adds on average: ``b - (E[Q(W) x] - E[W x])``.

    The expectation is over images and positions, for each output channel, with the inputs that the layer has in the
    float model. So the copy computes something else in float, by design and as far as the report says; quantize it.

    Args:
        model: In train or deploy form; it is not changed.
        calibration: Images ``[N, C, H, W]`` as at inference, in one tensor or in batches, with or without labels.

    Returns:
        The copy on the CPU in eval mode, half precision as float32, and a report; it unpacks.

    Raises:
        DataError: The images are none, or no images.

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
        https://arxiv.org/abs/1906.04721, section 4.2 and appendix D, with images in place of BatchNorm's statistics.
    """
    exact = deploy_copy(model)
    batches = like_model(exact, image_batches(calibration))
    layers = weighted_layers(exact)
    observed = {name: Observed(layer) for name, layer in layers.items()}
    watch(exact, batches, {name: seen.see_weights for name, seen in observed.items()})
    corrected = deploy_copy(exact)
    _subtract(_own_biases(weighted_layers(corrected)), {name: seen.shift() for name, seen in observed.items()})
    own = _own_biases(layers)
    expected = outputs(exact, batches)
    report = CorrectionReport(
        layers=[_row(name, observed[name]) for name in own],
        without_bias=[name for name in layers if name not in own],
        error_before=_distance(expected, outputs(with_rounded_weights(exact), batches)),
        error_after=_distance(expected, outputs(with_rounded_weights(corrected), batches)),
        float_change=_distance(expected, outputs(corrected, batches)),
        images=sum(map(len, batches)),
    )
    return BiasCorrected(corrected, report)


def _row(name: str, seen: Observed) -> CorrectedLayer:
    shift = seen.relative_shift()
    return CorrectedLayer(name=name, largest_shift=shift.max().item(), mean_shift=shift.mean().item())


def _own_biases(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The biases that one layer alone has: a shared one cannot take back two shifts."""
    biases = {name: layer.bias for name, layer in layers.items() if layer.bias is not None}
    uses = Counter(map(id, biases.values()))
    return {name: bias for name, bias in biases.items() if uses[id(bias)] == 1}


@torch.no_grad()
def _subtract(biases: Mapping[str, Tensor], shifts: Mapping[str, Tensor]) -> None:
    for name, bias in biases.items():
        bias.copy_(bias.double() - shifts[name])


def _distance(expected: Tensor, got: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()
