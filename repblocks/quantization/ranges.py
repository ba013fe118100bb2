"""What int8 will do to a model, layer by layer: ranges, errors, and the branch that made the outlier."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.shares import branch_kernels
from repblocks.errors import NonFiniteError
from repblocks.quantization.batches import Batches, image_batches
from repblocks.quantization.layers import Layer, deploy_copy, like_model, watch, weighted_layers
from repblocks.quantization.observation import Observed
from repblocks.quantization.rounding import WEIGHT_STEPS, rounded_as_a_whole, rounded_by_channel, sqnr_db


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlier:
    """The largest weight of the output channel whose other weights are smallest beside it.

    It sets the step that all of them are rounded to, so a signal-to-noise ratio, which it dominates, does not show it.

    Attributes:
        channel: That output channel.
        place: The weight's position in it: input channel within the group, then the tap.
        value: The weight.
        levels: How many of int8's 127 steps the median weight of the channel, zeros apart, is large; what is below half
            a step becomes 0.
        branches: What each parallel branch adds to the weight; they sum to it. Empty without branches.
    """

    channel: int
    place: tuple[int, ...]
    value: float
    levels: float
    branches: Mapping[str, float]

    @property
    def branch(self) -> str | None:
        """The branch that adds most, in the direction of the weight."""
        sign = 1.0 if self.value >= 0 else -1.0
        return max(self.branches, key=lambda name: sign * self.branches[name], default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """What a layer reads and gives on the images.

    Attributes:
        input_low, input_high: Range of what it reads.
        output_low, output_high: Range of what it gives, before any activation.
        input_sqnr_db: Signal-to-noise ratio of what it reads, rounded with one scale for all channels.
        output_sqnr_db: Signal-to-noise ratio of what it gives with rounded weights.
        largest_shift: The largest mean error of an output channel with rounded weights, relative to the standard
            deviation of the output.
    """

    input_low: float
    input_high: float
    output_low: float
    output_high: float
    input_sqnr_db: float
    output_sqnr_db: float
    largest_shift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRanges:
    """One convolution or linear layer of the deploy form.

    Attributes:
        name: Of the block that folds to it, or of the layer.
        shape: Of its weight.
        channel_ranges: Largest magnitude of a weight, per output channel.
        sqnr_db: Signal-to-noise ratio of the weights, rounded with one scale per output channel.
        whole_sqnr_db: The same with one scale for the whole kernel.
        worst_channel_sqnr_db: The lowest of any output channel.
        zeroed: Share of the weights, zeros apart, that become 0.
        outlier: None where all weights are 0.
        activations: None where the layer was not called, or without images.
    """

    name: str
    shape: tuple[int, ...]
    channel_ranges: tuple[float, ...]
    sqnr_db: float
    whole_sqnr_db: float
    worst_channel_sqnr_db: float
    zeroed: float
    outlier: Outlier | None
    activations: Activations | None

    @property
    def spread(self) -> float:
        """Largest over median range of the output channels: what one scale for the whole kernel suffers from."""
        ranges = torch.tensor(self.channel_ranges)
        median = ranges.median().item()
        return ranges.max().item() / median if median else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeReport:
    """What int8 will do to every layer.

    Attributes:
        layers: In the order of the model.
        images: On which activations were measured.
    """

    layers: Sequence[LayerRanges]
    images: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, with each layer's ``spread`` and its outlier's ``branch``, for JSON."""
        rows = [
            {
                **asdict(layer),
                "spread": layer.spread,
                "outlier": layer.outlier and {**asdict(layer.outlier), "branch": layer.outlier.branch},
            }
            for layer in self.layers
        ]
        return {"layers": rows, "images": self.images}

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len(_TITLES[0])])
        return "\n".join("  ".join([row[0].ljust(width), *map(_aligned, row[1:], _TITLES[1:])]) for row in self._rows())

    def _rows(self) -> list[Sequence[str]]:
        return [_TITLES, *map(_cells, self.layers)]


def range_report(model: nn.Module, images: Batches | None = None) -> RangeReport:
    """Ranges and int8 errors of every convolution and linear layer of the deploy form; nothing is changed.

    Args:
        model: In train form, so that the report can name branches; or in deploy form.
        images: ``[N, C, H, W]`` as at inference, in one tensor or in batches, to measure activations on.

    Raises:
        DataError: The images are none, or no images.
        FoldError: A block does not fold.
        NonFiniteError: A layer has NaN or infinite weights, which have no range.
    """
    deploy = deploy_copy(model)
    batches = [] if images is None else like_model(deploy, image_batches(images))
    layers = weighted_layers(deploy)
    _require_finite(layers)
    observed = {name: Observed(layer) for name, layer in layers.items()}
    watch(deploy, batches, {name: seen.see_range for name, seen in observed.items()})
    watch(deploy, batches, {name: seen.see_error for name, seen in observed.items()})
    rows = [_layer_ranges(model, name, layer, observed[name]) for name, layer in layers.items()]
    return RangeReport(layers=rows, images=sum(map(len, batches)))


def _require_finite(layers: Mapping[str, Layer]) -> None:
    for name, layer in layers.items():
        if not layer.weight.isfinite().all():
            raise NonFiniteError(f"the weights of {name!r} are NaN or infinite; needed finite ones")


def _layer_ranges(model: nn.Module, name: str, layer: Layer, seen: Observed) -> LayerRanges:
    block = _block_of(model, name)
    weight = layer.weight.detach().double()
    rounded = rounded_by_channel(weight)
    return LayerRanges(
        name=name if block is None else name.rpartition(".")[0] or name,
        shape=tuple(weight.shape),
        channel_ranges=tuple(weight.abs().flatten(1).amax(1).tolist()),
        sqnr_db=sqnr_db(weight, rounded),
        whole_sqnr_db=sqnr_db(weight, rounded_as_a_whole(weight)),
        worst_channel_sqnr_db=min(map(sqnr_db, weight, rounded)),
        zeroed=((rounded == 0) & (weight != 0)).sum().item() / max(weight.count_nonzero().item(), 1),
        outlier=_outlier(weight, {} if block is None else branch_kernels(block)),
        activations=_activations(seen),
    )


def _block_of(model: nn.Module, name: str) -> RepConv | None:
    """The block in train form that folds to the layer of this name."""
    path, _, last = name.rpartition(".")
    block = dict(model.named_modules()).get(path) if last == "conv" else None
    return block if isinstance(block, RepConv) and block.form == "train" else None


def _outlier(weight: Tensor, kernels: Mapping[str, Tensor]) -> Outlier | None:
    if not weight.any():
        return None
    parts = kernels if len(kernels) > 1 else {}
    # Branches are aligned with each other; the deploy layer's kernel may have grown by zeros to pad evenly.
    kernel = sum(parts.values(), torch.zeros(())) if parts else weight
    levels = _levels(kernel)
    channel = int(levels.argmin())
    row = kernel[channel]
    place = tuple(map(int, torch.unravel_index(row.abs().argmax(), row.shape)))
    return Outlier(
        channel=channel,
        place=place,
        value=row[place].item(),
        levels=levels[channel].item(),
        branches={name: part[channel][place].item() for name, part in parts.items()},
    )


def _levels(kernel: Tensor) -> Tensor:
    """The median weight of each output channel in steps; infinite for a channel of zeros."""
    sizes = kernel.abs().flatten(1)
    medians = sizes.where(sizes > 0, torch.nan).nanmedian(1).values
    return (WEIGHT_STEPS * medians / sizes.amax(1)).nan_to_num(nan=torch.inf)


def _activations(seen: Observed) -> Activations | None:
    if not seen.calls:
        return None
    return Activations(
        input_low=seen.input_low,
        input_high=seen.input_high,
        output_low=seen.output_low,
        output_high=seen.output_high,
        input_sqnr_db=seen.input_sqnr_db(),
        output_sqnr_db=seen.output_sqnr_db(),
        largest_shift=seen.relative_shift().max().item(),
    )


_TITLES = (
    "layer", "weights dB", "one scale dB", "worst channel dB", "spread", "zeroed", "levels", "outlier from",
    "reads", "reads dB", "gives dB", "shift",
)  # fmt: skip


def _cells(layer: LayerRanges) -> list[str]:
    cells = [layer.name, f"{layer.sqnr_db:.1f}", f"{layer.whole_sqnr_db:.1f}", f"{layer.worst_channel_sqnr_db:.1f}"]
    outlier, seen = layer.outlier, layer.activations
    cells += [f"{layer.spread:.1f}", f"{layer.zeroed:.1%}"]
    cells += [f"{outlier.levels:.1f}", outlier.branch or "-"] if outlier else ["-", "-"]
    if seen is None:
        return [*cells, "-", "-", "-", "-"]
    reads = f"{seen.input_low:.3g}..{seen.input_high:.3g}"
    return [*cells, reads, f"{seen.input_sqnr_db:.1f}", f"{seen.output_sqnr_db:.1f}", f"{seen.largest_shift:.1%}"]


def _aligned(cell: str, title: str) -> str:
    return cell.rjust(max(len(title), 12 if title in ("outlier from", "reads") else 0))
