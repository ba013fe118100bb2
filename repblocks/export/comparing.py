"""Images to compare on, and the comparison of what was written with what was given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from repblocks.errors import ConfigurationError, VerificationError
from repblocks.export.jobs import Sizes
from repblocks.header import dtype_of
from repblocks.images import random_images
from repblocks.verification import HALF_PRECISION, EquivalenceReport, block_errors, most_different, verify

#: Images drawn at random for the comparison, beside those that the caller gives. The rule for half precision compares
#: two maxima of rounding errors: on 4 images 3% of equal models fail it, on 16 less than 1%.
RANDOM_IMAGES, RANDOM_IMAGES_IN_HALF_PRECISION = 4, 16
#: Pixels added to height and width where sizes are open: networks halve their input five times.
OTHER_SIZES = ((32, 0), (32, 64))


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model, and how it came to be written: what a comparison that fails has to name.

    Attributes:
        reference: As it was given.
        deploy: In deploy form.
    """

    reference: nn.Module
    deploy: nn.Module


def batches_for(model: nn.Module, inputs: Tensor | None, sizes: Sizes) -> list[Tensor]:
    """Random images, the same in every export, and the given ones, in the model's dtype; some in other sizes too.

    Raises:
        ConfigurationError: Nothing says how large images are, or the model does not take the given ones.
    """
    config: dict[str, Any] = vars(model).get("pretrained_cfg", {})
    if inputs is None and "input_size" not in config:
        raise ConfigurationError(
            f"{type(model).__name__} has no pretrained_cfg['input_size'] to draw images of; "
            "pass some with inputs=images"
        )
    if inputs is not None:
        _require_accepted(model, inputs)
    size = config["input_size"] if inputs is None else inputs.shape[1:]
    dtype = dtype_of(model)
    count = RANDOM_IMAGES_IN_HALF_PRECISION if dtype in HALF_PRECISION else RANDOM_IMAGES
    drawn = random_images(count, size)
    batches = [images.detach().cpu().float() for images in (drawn, inputs) if images is not None]
    resized = _resized(model, batches[-1][:RANDOM_IMAGES]) if sizes == "dynamic" else []
    return [images.to(dtype) for images in (*batches, *resized)]


def compare(
    what: str, pair: Pair, run: Callable[[Tensor], Any], batches: Sequence[Tensor], *, reference: nn.Module
) -> EquivalenceReport:
    """The worst report over the batches, if all pass.

    Args:
        what: The subject of the error.
        pair: The model, to find the block that differs.
        run: Executes what was written.
        batches: Images that it takes.
        reference: The model as given, for such images.

    Raises:
        VerificationError: They differ.
    """
    reports = [verify(reference, in_parts(run), images) for images in batches]
    for report, images in zip(reports, batches, strict=True):
        if not report.passed:
            blame = _blame(pair, run, images) if reference is pair.reference else "look at the writer or its runtime"
            raise VerificationError(f"{what} differs from the exported model: {report}; {blame}; no file was written")
    worst = max(reports, key=lambda report: report.relative_error)
    return replace(worst, samples=sum(report.samples for report in reports))


def in_parts(run: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The same outputs, of batches of 1, of 2 and of the rest: the batch axis has to be open."""

    def run_in_parts(images: Tensor) -> Any:
        outputs = [_output(run, images[start:stop]) for start, stop in _parts(len(images))]
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        if isinstance(outputs[0], Mapping):
            return {key: torch.cat([output[key] for output in outputs]) for key in outputs[0]}
        return [torch.cat(same) for same in zip(*outputs, strict=True)]

    return run_in_parts


def _output(run: Callable[[Tensor], Any], images: Tensor) -> Any:
    try:
        return run(images)
    except Exception as error:  # every runtime has its own classes of errors
        raise VerificationError(
            f"what was written fails on images {list(images.shape)}, which the model takes: {error}; no file was kept; "
            "leave this format out, or ask less of it with sizes='fixed'"
        ) from error


def batch_sizes(batches: Sequence[Tensor], largest: int | None = None) -> list[int]:
    """The sizes of all batches that `in_parts` runs, of a file that takes at most so many images."""
    return sorted({min(stop - start, largest or stop) for images in batches for start, stop in _parts(len(images))})


def image_sizes(batches: Sequence[Tensor]) -> list[list[int]]:
    """Heights and widths of the images."""
    return [list(size) for size in sorted({tuple(images.shape[2:]) for images in batches})]


def _parts(count: int) -> list[tuple[int, int]]:
    edges = [edge for edge in (0, 1, 3) if edge < count]
    return list(zip(edges, [*edges[1:], count], strict=True))


def _resized(model: nn.Module, images: Tensor) -> list[Tensor]:
    height, width = images.shape[2:]
    sizes = [(height + down, width + right) for down, right in OTHER_SIZES]
    resized = [interpolate(images, size=size, mode="bilinear") for size in sizes]
    try:
        with torch.inference_mode():
            for larger in resized:
                model(larger[:1].to(dtype_of(model)))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigurationError(
            f"sizes='dynamic' needs a model that takes images of other sizes than {height}x{width}, and this "
            f"{type(model).__name__} says: {error}; use sizes='fixed'"
        ) from error
    return resized


def _require_accepted(model: nn.Module, inputs: Tensor) -> None:
    """Run one of the images: a model of the user's own does not say which it takes."""
    channels = vars(model).get("model_args", {}).get("in_chans", "C")
    needed = f"export needs inputs=images of shape [N, {channels}, H, W]"
    if inputs.ndim != 4 or not inputs.numel() or channels not in ("C", inputs.shape[1]):
        raise ConfigurationError(f"{needed}, and got {list(inputs.shape)}")
    try:
        with torch.inference_mode():
            model(inputs[:1].detach().cpu().to(dtype_of(model)))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigurationError(
            f"{needed} that the model runs on; on {list(inputs.shape)} {type(model).__name__} says: {error}"
        ) from error


def _blame(pair: Pair, run: Callable[[Tensor], Any], images: Tensor) -> str:
    """The block to look at; for a runtime that shows no blocks, that of the model the file was written from."""
    errors = block_errors(pair.reference, run if isinstance(run, nn.Module) else pair.deploy, images)
    name = most_different(errors)
    block = (
        f"the block that differs most is {name or type(pair.reference).__name__!r} (relative error {errors[name]:.2g})"
    )
    return (
        block if isinstance(run, nn.Module) else f"before it was written {block}, so look at the writer or its runtime"
    )
