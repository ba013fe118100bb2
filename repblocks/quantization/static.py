"""Post-training static quantization: the deploy form as an int8 ONNX file, kept only if it is accurate enough."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repblocks.blocks.base import deployed
from repblocks.errors import ConfigurationError, DataError, VerificationError
from repblocks.export import FORMATS, check_formats
from repblocks.export.manifest import adding
from repblocks.graph.collapse import Where, selected
from repblocks.quantization.batches import Batches, image_batches, labelled_batches
from repblocks.quantization.int8_file import METHODS, Calibration, write_int8
from repblocks.quantization.layers import outputs, require_float32, weighted_layers
from repblocks.quantization.rounding import sqnr_db

FILENAME = "model.int8.onnx"
KEY = "int8"
"""What ``deploy.json`` calls the file."""
Run = Callable[[Tensor], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """What `quantize` wrote, and how good it is.

    Attributes:
        path: The file.
        bytes: Its size.
        method: How ranges of activations were taken from the calibration images.
        weight_bits: 8, or 7.
        in_float: Layers that were not quantized.
        calibration_images: How many those were.
        output_sqnr_db: Signal-to-noise ratio of the outputs on those, in decibel.
        agreement: Share of those that get the same class as by the float model.
        labelled_images: On which accuracy was measured; 0 without.
        float_accuracy, int8_accuracy: On those; None without.
        max_drop: By how much the accuracy was allowed to drop; None where it was not measured.
        versions: Of the packages that wrote the file.
    """

    path: Path
    bytes: int
    method: Calibration
    weight_bits: int
    in_float: tuple[str, ...]
    calibration_images: int
    output_sqnr_db: float
    agreement: float
    labelled_images: int
    float_accuracy: float | None
    int8_accuracy: float | None
    max_drop: float | None
    versions: Mapping[str, str]

    @property
    def drop(self) -> float | None:
        """How much accuracy int8 costs, of 1; negative if it is better."""
        if self.float_accuracy is None or self.int8_accuracy is None:
            return None
        return self.float_accuracy - self.int8_accuracy

    def to_dict(self) -> dict[str, Any]:
        """The fields and ``drop``, for JSON; the file without its folder."""
        return {**asdict(self), "path": self.path.name, "drop": self.drop}

    def __str__(self) -> str:
        measured = (
            "accuracy not measured"
            if self.drop is None
            else f"accuracy {self.float_accuracy:.2%} in float, {self.int8_accuracy:.2%} in int8 on "
            f"{self.labelled_images} images (may drop by {self.max_drop:.2%})"
        )
        return (
            f"{self.path}: {self.bytes:,} bytes, {measured}; {self.agreement:.2%} of {self.calibration_images} "
            f"calibration images get the same class, outputs {self.output_sqnr_db:.1f} dB above the error"
        )


def quantize(
    model: nn.Module,
    calibration: Batches,
    folder: str | Path,
    *,
    reference: nn.Module | None = None,
    labelled: Batches | None = None,
    max_drop: float = 0.01,
    method: Calibration = "minmax",
    weight_bits: Literal[7, 8] = 8,
    in_float: Where = (),
) -> QuantizationReport:
    """Write the deploy form as ``model.int8.onnx``, run it in ONNX Runtime, and keep it if it is accurate enough.

    Weights are int8 with one scale per output channel, activations uint8 with one scale per tensor (QDQ format). The
    batch axis is dynamic, the image size that of the calibration images, which are normalised. A ``deploy.json`` in the
    folder describes the file then as ``int8``, so that `load_deploy` opens it.

    Args:
        model: In train or deploy form, in float32; it is not changed. To lose less, give what `best_prepared`,
            `equalized` or `bias_corrected` make of it, or train ``block="qarepvgg"``.
        calibration: Images ``[N, C, H, W]`` as at inference, in one tensor or in batches, with or without labels. They
            set the ranges of the activations; take some hundreds, and none of those that accuracy is measured on.
        folder: Made if it is missing.
        reference: The float model to compare with, if not ``model``: the one that was given to `bias_corrected`, which
            alone computes what was trained.
        labelled: Batches ``(images, labels, ...)`` to measure the accuracy of both on; negative labels do not count.
        max_drop: By how much, of 1, the accuracy may be lower in int8 before the file is refused.
        method: ``"minmax"`` keeps every activation in range; ``"percentile"`` cuts off one in ten thousand, and holds
            the activations of all calibration images in memory meanwhile.
        weight_bits: 7 for CPUs without VNNI or another int8 dot product, whose 16-bit sums overflow with 8.
        in_float: Modules of the deploy form whose convolutions and linear layers stay in float, as for `collapse`: a
            glob such as ``"stem*"``, several, or a predicate; those that `range_report` shows to lose most.

    Returns:
        The report, which ``deploy.json`` holds too.

    Raises:
        ConfigurationError: An unknown method, a ``max_drop`` that is no share, ``in_float`` that names no module, a
            model that is not float32 or returns something else than one tensor ``[N, classes, ...]``, or packages that
            are not installed.
        DataError: There are no images, or labels are missing.
        VerificationError: The accuracy drops by more than ``max_drop``, or the outputs of either model are not finite;
            no file is written, and one of before stays.
        CheckpointError: The file or its description cannot be written, or that of before cannot be read.

    Source: Krishnamoorthi 2018, https://arxiv.org/abs/1806.08342; the failure of plain RepVGG: Chu et al. 2022, "Make
        RepVGG Greater Again", https://arxiv.org/abs/2212.01593, table 1.
    """
    _check(method, max_drop, weight_bits)
    for each in (model, reference or model):
        require_float32(each)
    deploy = deployed(model).cpu()
    exact = deploy if reference is None else deployed(reference).cpu()
    batches = image_batches(calibration)
    kept = _kept_in_float(deploy, in_float)
    path = Path(folder) / FILENAME
    expected = _comparable(outputs(exact, batches))
    with adding(path, KEY, format="onnx") as (temporary, facts):
        write_int8(deploy, batches, temporary, method=method, weight_bits=weight_bits, in_float=kept)
        run = FORMATS["onnx"].open(temporary)
        got = torch.cat([run(batch) for batch in batches])
        measured = None if labelled is None else _accuracies({"float": exact, "int8": run}, labelled)
        report = QuantizationReport(
            path=path,
            bytes=temporary.stat().st_size,
            method=method,
            weight_bits=weight_bits,
            in_float=kept,
            calibration_images=len(got),
            output_sqnr_db=sqnr_db(expected.double(), got.double()),
            agreement=_same_class(expected, got),
            labelled_images=measured.images if measured else 0,
            float_accuracy=measured.share["float"] if measured else None,
            int8_accuracy=measured.share["int8"] if measured else None,
            max_drop=max_drop if measured else None,
            versions=_versions(),
        )
        _require_accurate(report, got)
        facts |= _facts(report)
    return report


def _kept_in_float(deploy: nn.Module, where: Where) -> tuple[str, ...]:
    if where is None or where == ():
        return ()
    inside = selected(deploy, where)
    return tuple(name for name in weighted_layers(deploy) if inside(name))


@dataclass(frozen=True, slots=True)
class _Accuracies:
    images: int
    share: Mapping[str, float]


@torch.no_grad()
def _accuracies(runs: Mapping[str, Run], labelled: Batches) -> _Accuracies:
    """Of several models in one pass over the batches."""
    correct, images = dict.fromkeys(runs, 0), 0
    for pictures, labels in labelled_batches(labelled):
        for name, run in runs.items():
            correct[name] += int((_scores(run(pictures)).argmax(1) == labels).sum())
        images += len(labels)
    if not images:
        raise DataError("got no labelled images; needed some to measure the accuracy on, or labelled=None")
    return _Accuracies(images, {name: count / images for name, count in correct.items()})


def _scores(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigurationError(
            f"accuracy needs class scores [N, classes], and the model gives {shape}; leave out labelled"
        )
    return output


def _comparable(expected: Tensor) -> Tensor:
    if expected.ndim < 2:
        raise ConfigurationError(
            f"the model gives {list(expected.shape)}; needed outputs [N, classes, ...], such as [N, 1] of a regression"
        )
    if not expected.isfinite().all():
        raise VerificationError(
            "the float model gives NaN or infinite outputs on the calibration images; look at its weights, and at what "
            "preprocesses the images"
        )
    return expected


def _same_class(expected: Tensor, got: Tensor) -> float:
    return (expected.argmax(1) == got.argmax(1)).double().mean().item()


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", *FORMATS["onnx"].packages)}


def _facts(report: QuantizationReport) -> dict[str, Any]:
    """The report without what ``deploy.json`` says of every file."""
    return {name: value for name, value in report.to_dict().items() if name not in ("path", "bytes")}


def _require_accurate(report: QuantizationReport, got: Tensor) -> None:
    if not got.isfinite().all():
        raise VerificationError("the int8 model gives NaN or infinite outputs; no file was written")
    if report.drop is not None and report.max_drop is not None and report.drop > report.max_drop:
        raise VerificationError(
            f"int8 gets {report.int8_accuracy:.2%} of {report.labelled_images} images right, float "
            f"{report.float_accuracy:.2%}: a drop of {report.drop:.2%}, and max_drop allows {report.max_drop:.2%}; no "
            "file was written; quantize best_prepared(model, images).model with reference=model, keep layers in float "
            'by in_float=, try method="percentile" or more calibration images, train block="qarepvgg", or allow a '
            "larger max_drop"
        )


def _check(method: str, max_drop: float, weight_bits: int) -> None:
    if method not in METHODS:
        raise ConfigurationError(f"got method={method!r}; needed one of {', '.join(METHODS)}")
    if not 0 <= max_drop <= 1:
        raise ConfigurationError(f"got max_drop={max_drop}; needed a share of all images from 0 to 1, such as 0.01")
    if weight_bits not in (7, 8):
        raise ConfigurationError(f"got weight_bits={weight_bits}; needed 8, or 7 for CPUs without VNNI")
    check_formats(["onnx"])
