"""Ways to prepare a model for int8, by name, and the one that keeps its outputs best."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from repblocks.blocks.base import deployed
from repblocks.export import FORMATS
from repblocks.names import known_name
from repblocks.quantization.batches import Batches, image_batches
from repblocks.quantization.correction import bias_corrected
from repblocks.quantization.equalization import equalized
from repblocks.quantization.int8_file import write_int8
from repblocks.quantization.layers import outputs, require_float32
from repblocks.quantization.rounding import sqnr_db

Prepare = Callable[[nn.Module, Batches], nn.Module]


def _equalized(model: nn.Module, images: Batches) -> nn.Module:
    return equalized(model).model


def _equalized_by_activations(model: nn.Module, images: Batches) -> nn.Module:
    return equalized(model, activations=images).model


def _corrected_after(first: Prepare) -> Prepare:
    return lambda model, images: bias_corrected(first(model, images), images).model


def _as_it_is(model: nn.Module, images: Batches) -> nn.Module:
    return deployed(model)


PREPARATIONS: Mapping[str, Prepare] = {
    "none": _as_it_is,
    "equalized": _equalized,
    "equalized-by-activations": _equalized_by_activations,
    "corrected": _corrected_after(_as_it_is),
    "equalized-corrected": _corrected_after(_equalized),
    "equalized-by-activations-corrected": _corrected_after(_equalized_by_activations),
}


def prepared(model: nn.Module, calibration: Batches, how: str) -> nn.Module:
    """A deploy copy that was prepared in one of the ways of ``PREPARATIONS``; the model is not changed.

    Args:
        model: In train or deploy form.
        calibration: Images ``[N, C, H, W]``, in one tensor or in batches.
        how: Its name.

    Raises:
        ConfigurationError: An unknown way.
        DataError: The images are none, or no images.
    """
    return PREPARATIONS[known_name("how", how, PREPARATIONS)](model, image_batches(calibration))


class BestPrepared(NamedTuple):
    """What kept the outputs best.

    Attributes:
        model: The prepared deploy copy.
        how: The way's name.
        output_sqnr_db: Signal-to-noise ratio of the int8 outputs on the images, of every way.
    """

    model: nn.Module
    how: str
    output_sqnr_db: Mapping[str, float]


def best_prepared(model: nn.Module, calibration: Batches) -> BestPrepared:
    """Quantize the model in every way of ``PREPARATIONS``, and give the one whose int8 outputs are nearest to its own.

    No labels are looked at, so that an accuracy measured later is an honest one.

    Args:
        model: In train or deploy form, in float32; it is not changed.
        calibration: Images ``[N, C, H, W]`` as at inference, in one tensor or in batches.

    Raises:
        ConfigurationError: The model is not float32.
        DataError: The images are none, or no images.
    """
    require_float32(model)
    batches = image_batches(calibration)
    expected = outputs(deployed(model).cpu(), batches)
    models = {how: prepare(model, batches) for how, prepare in PREPARATIONS.items()}
    found = {how: _output_sqnr_db(candidate.cpu(), expected, batches) for how, candidate in models.items()}
    best = max(found, key=lambda how: found[how])
    return BestPrepared(models[best], best, found)


def _output_sqnr_db(model: nn.Module, expected: Tensor, batches: Sequence[Tensor]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        write_int8(model, batches, path)
        run = FORMATS["onnx"].open(path)
        return sqnr_db(expected.double(), torch.cat([run(batch) for batch in batches]).double())
