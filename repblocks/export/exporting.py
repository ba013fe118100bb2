"""Deploy files: collapsed, run in their own runtime, compared with what was trained, and only then kept."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repblocks.blocks.base import deployed
from repblocks.deploy_form import deploy_form_of
from repblocks.errors import CheckpointError
from repblocks.export import manifest
from repblocks.export.comparing import Pair, batch_sizes, batches_for, compare, image_sizes
from repblocks.export.formats import FORMATS, Format, check_formats, require_dtype
from repblocks.export.half_range import HalfRange, half_range
from repblocks.export.jobs import Job, Sizes, require_sizes, shape_of_input
from repblocks.export.pixels import Pixels, denormalized, require_pixels, taking
from repblocks.files import remove_unfinished, replacing
from repblocks.header import dtype_of
from repblocks.verification import EquivalenceReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        files: Path by format.
        equivalence: Comparison of each file, run in its own runtime, with the model that was exported.
        half_range: The layers that would overflow in float16.
        manifest: Path of ``deploy.json``.
    """

    files: Mapping[str, Path]
    equivalence: Mapping[str, EquivalenceReport]
    half_range: HalfRange
    manifest: Path


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    formats: Iterable[str] = ("safetensors", "onnx"),
    inputs: Tensor | None = None,
    sizes: Sizes = "fixed",
    pixels: Pixels = "normalized",
    opset: int | None = None,
    source: str | Path | None = None,
) -> ExportReport:
    """Write the deploy form of a model, and ``deploy.json`` that describes the files.

    Graphs hold what `repblocks.collapse` makes of layers that are no blocks of ours, too; files of weights keep those,
    for they have to fit the class that loads them.

    Every file is written under a temporary name, executed in its own runtime and compared with the model as given, in
    several batch sizes. Only when all of them agree do they get their names; otherwise the folder stays as it was.

    Args:
        model: In train or deploy form, on any device; it is not changed.
        folder: Made if it is missing; files of an earlier export are replaced, or removed if their
            format is not chosen now.
        formats: Keys of ``FORMATS``.
        inputs: Real images ``[N, C, H, W]``, normalised, to compare on, beside random ones. Their size becomes the
            input size of graphs, whose batch axis is open; otherwise that is ``model.pretrained_cfg["input_size"]``.
        sizes: Whether graphs (ONNX, .pt2, OpenVINO) take images of that size only, or are ``dynamic`` and compared in
            others too. ExecuTorch's is always fixed.
        pixels: What graphs take: ``normalized`` images; or pixels, in [0, 1] (``unit``) or from 0 to 255 (``uint8``),
            which they normalise by the model's own mean and std. Nothing is resized in a graph.
        opset: Of ONNX; None for the exporter's default. ``deploy.json`` states it.
        source: The checkpoint that the model was loaded from, to note its hash.

    Raises:
        ConfigurationError: An unknown format, packages that are not installed, a dtype or size that a format cannot
            hold, no known input size, ``inputs`` that the model does not take, or a graph that torch cannot trace.
        CheckpointError: No registered name rebuilds the model, which safetensors needs; or a file cannot be written.
        VerificationError: A file or the deploy form differs from the model; the message names the block that
            differs most.
    """
    chosen = check_formats(formats)
    require_sizes(sizes)
    require_pixels(pixels)
    work = _Export(model, inputs, sizes=sizes, pixels=pixels, opset=opset)
    for name, format in chosen.items():
        work.require_dtypes(name, format)
    return work.write(Path(folder), chosen, _source(source))


class _Export:
    """A model on its way into files."""

    def __init__(
        self, model: nn.Module, inputs: Tensor | None, *, sizes: Sizes, pixels: Pixels, opset: int | None
    ) -> None:
        reference = copy.deepcopy(model).cpu().eval()
        config: dict[str, Any] = vars(reference).get("pretrained_cfg", {})
        self.batches = batches_for(reference, inputs, sizes)
        self.pair = Pair(reference=reference, deploy=deployed(reference))
        compare("the deploy form", self.pair, self.pair.deploy, self.batches, reference=reference)
        self.plain = deploy_form_of(self.pair.deploy, self.batches[0][:1]).model
        self.reference_of_pixels = taking(reference, pixels, config)
        self.pixels = [denormalized(images, pixels, config) for images in self.batches]
        self.job = Job(
            reference=reference,
            deploy=self.pair.deploy,
            graph=taking(self.plain, pixels, config),
            images=self.pixels[0],
            pixels=pixels,
            sizes=sizes,
            opset=opset,
        )

    def require_dtypes(self, name: str, format: Format) -> None:
        """Check that a format holds all weights."""
        for dtype in {dtype_of(self.job.deploy), *(parameter.dtype for parameter in self.job.deploy.parameters())}:
            require_dtype(name, format, dtype)

    def write(self, folder: Path, chosen: Mapping[str, Format], source: dict[str, Any] | None) -> ExportReport:
        """All files, or none."""
        entries: dict[str, dict[str, Any]] = {}
        equivalence: dict[str, EquivalenceReport] = {}
        in_half = half_range(self.plain, self.batches)
        earlier = _earlier_files(folder)
        with ExitStack() as files:  # closes in reverse: the manifest gets its name after the files it describes
            description = files.enter_context(replacing(folder / manifest.NAME))
            for name, format in chosen.items():
                paths = [files.enter_context(replacing(folder / filename)) for filename in format.filenames]
                facts = format.write(self.job, *paths)
                equivalence[name] = self._compare(name, format, paths)
                entries[name] = self._entry(name, format, paths, facts, equivalence[name])
            about = {"source": source, "float16": in_half.to_dict()}
            manifest.write(description, manifest.described(self.job.deploy, chosen, entries, **about))
        _remove_stale(folder, chosen.values(), earlier)
        return ExportReport(
            files={name: folder / format.filename for name, format in chosen.items()},
            equivalence=equivalence,
            half_range=in_half,
            manifest=folder / manifest.NAME,
        )

    def _compare(self, name: str, format: Format, paths: list[Path]) -> EquivalenceReport:
        run = format.open(*paths)
        reference = self.pair.reference if format.holds == "weights" else self.reference_of_pixels
        return compare(f"the {name} file", self.pair, run, self._images(format), reference=reference)

    def _images(self, format: Format) -> list[Tensor]:
        """What a file of this format is given: images or pixels, and only of one size where it takes no other."""
        batches = self.batches if format.holds == "weights" else self.pixels
        return [
            images for images in batches if format.image_sizes == "open" or images.shape[1:] == batches[0].shape[1:]
        ]

    def _entry(
        self, name: str, format: Format, paths: list[Path], facts: Mapping[str, Any], report: EquivalenceReport
    ) -> dict[str, Any]:
        images = self._images(format)
        beside = [
            {"file": filename, **manifest.fingerprint(path)}
            for filename, path in zip(format.beside, paths[1:], strict=True)
        ]
        return {
            "format": name,
            "file": format.filename,
            **manifest.fingerprint(paths[0]),
            **({"beside": beside} if beside else {}),
            **facts,
            "input": self._input(format),
            "compared": {
                "batch_sizes": batch_sizes(images, facts.get("largest_batch")),
                "image_sizes": image_sizes(images),
            },
            "equivalence": report.to_dict(),
        }

    def _input(self, format: Format) -> dict[str, Any]:
        if format.holds == "weights":
            return {"layout": "NCHW", "pixels": "normalized", "dtype": _name(self.batches[0].dtype)}
        shape = shape_of_input(self.job)
        if format.image_sizes == "one":
            shape = ["batch", *self.job.images.shape[1:]]
        return {
            "name": "images",
            "layout": "NCHW",
            "shape": shape,
            "pixels": self.job.pixels,
            "dtype": _name(self.job.images.dtype),
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _source(path: str | Path | None) -> dict[str, Any] | None:
    return None if path is None else {"file": Path(path).name, "sha256": manifest.sha256(Path(path))}


def _earlier_files(folder: Path) -> list[Path]:
    """What an earlier export described and wrote, where it is still as written."""
    try:
        files = manifest.files_in(folder, manifest.read(folder)).values()
    except CheckpointError:
        return []
    pairs = [pair for file in files for pair in zip(file.paths, file.hashes, strict=True)]
    return [path for path, expected in pairs if path.is_file() and manifest.sha256(path) == expected]


def _remove_stale(folder: Path, chosen: Iterable[Format], earlier: Iterable[Path]) -> None:
    """Remove what earlier exports left: files that the new ``deploy.json`` leaves out, and unfinished ones."""
    names = {name for format in FORMATS.values() for name in format.filenames}
    stale = {*earlier, *(folder / name for name in names)}
    stale -= {folder / name for format in chosen for name in format.filenames}
    for path in stale:
        path.unlink(missing_ok=True)
    remove_unfinished(folder)
