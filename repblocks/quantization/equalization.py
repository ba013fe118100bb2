"""Cross-layer range equalization: channels of one convolution scaled, and unscaled in the next one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repblocks.quantization.batches import Batches, image_batches
from repblocks.quantization.layers import deploy_copy, like_model, watch
from repblocks.quantization.pairs import Conv, Pair, find_pairs
from repblocks.verification import verify

MOST_SWEEPS = 1000
CONVERGED = 1e-3
"""No scale changes by a larger factor than ``1 + CONVERGED`` in the last sweep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualizedPair:
    """What became of a pair.

    Attributes:
        first, second: Names of the convolutions.
        smallest_scale, largest_scale: Output channels of the first are divided by these, and by what lies between.
        imbalance_before, imbalance_after: The largest ratio, over the channels, of a channel's range in the first to
            its range in the second, or the other way round; 1 is balanced.
    """

    first: str
    second: str
    smallest_scale: float
    largest_scale: float
    imbalance_before: float
    imbalance_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualizationReport:
    """What `equalized` did.

    Attributes:
        pairs: Every pair that was equalized.
        refused: Every convolution whose output was left as it is, and why.
        sweeps: Rounds over all pairs.
    """

    pairs: Sequence[EqualizedPair]
    refused: Mapping[str, str]
    sweeps: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        pairs = [
            f"  {pair.first} -> {pair.second}: scales {pair.smallest_scale:.2g} to {pair.largest_scale:.2g}, imbalance "
            f"{pair.imbalance_before:.3g} -> {pair.imbalance_after:.3g}"
            for pair in self.pairs
        ]
        refused = [f"  {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(
            [f"equalized {len(pairs)} pairs in {self.sweeps} sweeps", *pairs, f"left {len(refused)}", *refused]
        )


class Equalized(NamedTuple):
    """A deploy copy with equalized ranges, and what was done to get there."""

    model: nn.Module
    report: EqualizationReport


def equalized(model: nn.Module, *, activations: Batches | None = None) -> Equalized:
    """A deploy copy that computes the same in float, and loses less in int8: ``equalized(m).model(x) == m(x)``.

    Output channel ``c`` of a convolution is divided by ``s_c > 0`` and the same input channel of the next one
    multiplied by it, which ReLU and LeakyReLU let pass. With ``r1_c`` and ``r2_c`` the channel's ranges in the two,
    ``s_c = sqrt(r1_c / r2_c)`` makes both ``sqrt(r1_c r2_c)``; as a convolution is in two pairs, the pairs are swept
    until nothing changes. A channel with an empty range stays, and so do weights that two things use; but tracing does
    not see all uses (a list of weights, ``self.parameters()`` in ``forward``), so with images the copy is compared.

    Args:
        model: In train or deploy form; it is not changed. Blocks are collapsed; BatchNorms beyond them separate
            convolutions, so `collapse` a model of other classes first.
        activations: Images ``[N, C, H, W]``, in one tensor or in batches, on which the ranges of the activations
            between the two are measured. These then take the place of the first kernel's ranges ``r1``: with a scale
            per output channel of a kernel and one for all channels of an activation, the latter are what suffers. The
            copy is compared with the model on the first batch.

    Returns:
        The copy on the CPU in eval mode, half precision as float32, and a report; it unpacks.

    Raises:
        DataError: The images are none, or no images.
        VerificationError: The copy computes something else on them.

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
        https://arxiv.org/abs/1906.04721, section 4.1; ranges of activations as in Xiao et al. 2022, "SmoothQuant",
        https://arxiv.org/abs/2211.10438, with migration strength 0.5.
    """
    duplicate = deploy_copy(model)
    pairs = find_pairs(duplicate)
    batches = [] if activations is None else like_model(duplicate, image_batches(activations))
    measured = _activation_ranges(duplicate, pairs.found, batches)
    links = _links(duplicate, pairs.found, measured)
    before = [link.imbalance() for link in links]
    sweeps = _sweep(links)
    for link in links:
        _rescale(duplicate, link)
    for images in batches[:1]:
        verify(deploy_copy(model), duplicate, images).raise_if_different("the equalized model")
    rows = [_row(link, imbalance) for link, imbalance in zip(links, before, strict=True)]
    return Equalized(duplicate, EqualizationReport(pairs=rows, refused=pairs.refused, sweeps=sweeps))


class _Kernel:
    """The largest magnitude of a kernel per output and input channel, in float64."""

    def __init__(self, conv: Conv) -> None:
        self.groups = conv.groups
        self.peaks = conv.weight.detach().double().abs().flatten(2).amax(2)

    def rows(self) -> Tensor:
        return self.peaks.amax(1)

    def columns(self) -> Tensor:
        return self.peaks.unflatten(0, (self.groups, -1)).amax(1).flatten()

    def divide_rows(self, scales: Tensor) -> None:
        self.peaks = self.peaks / scales[:, None]

    def multiply_columns(self, scales: Tensor) -> None:
        self.peaks = (self.peaks.unflatten(0, (self.groups, -1)) * scales.view(self.groups, 1, -1)).flatten(0, 1)


class _Link:
    """A pair with the scales found so far."""

    def __init__(self, pair: Pair, first: _Kernel, second: _Kernel, activations: Tensor | None) -> None:
        self.pair, self.first, self.second, self.activations = pair, first, second, activations
        self.scales = torch.ones_like(second.columns())

    def ratios(self) -> Tensor:
        """``r1 / r2`` as things stand; 1 where one of them is 0."""
        ours = self.first.rows() if self.activations is None else self.activations / self.scales
        ratios = ours / self.second.columns()
        return torch.where(ratios.isfinite() & (ratios > 0), ratios, 1.0)

    def imbalance(self) -> float:
        return math.exp(self.ratios().log().abs().max().item())

    def balance(self) -> float:
        """Balance the two; gives the logarithm of the factor that changed most."""
        change = self.ratios().sqrt()
        self.first.divide_rows(change)
        self.second.multiply_columns(change)
        self.scales = self.scales * change
        return change.log().abs().max().item()


def _links(model: nn.Module, pairs: Sequence[Pair], measured: Mapping[str, Tensor]) -> list[_Link]:
    names = {name for pair in pairs for name in (pair.first, pair.second)}
    kernels = {name: _Kernel(_conv(model, name)) for name in names}
    return [_Link(pair, kernels[pair.first], kernels[pair.second], measured.get(pair.second)) for pair in pairs]


def _sweep(links: Sequence[_Link]) -> int:
    for sweep in range(MOST_SWEEPS if links else 0):
        if max([link.balance() for link in links]) < math.log1p(CONVERGED):
            return sweep + 1
    return MOST_SWEEPS if links else 0


@torch.no_grad()
def _rescale(model: nn.Module, link: _Link) -> None:
    first, second = _conv(model, link.pair.first), _conv(model, link.pair.second)
    rows = link.scales.view(-1, *(1,) * (first.weight.ndim - 1))
    first.weight.copy_(first.weight.double() / rows)
    if first.bias is not None:
        first.bias.copy_(first.bias.double() / link.scales)
    columns = link.scales.view(second.groups, 1, -1, *(1,) * (second.weight.ndim - 2))
    second.weight.copy_((second.weight.double().unflatten(0, (second.groups, -1)) * columns).flatten(0, 1))


def _activation_ranges(model: nn.Module, pairs: Sequence[Pair], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The largest magnitude that the second convolution of each pair reads, per channel; none without images."""
    found: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        largest = x.double().abs().movedim(1, 0).flatten(1).amax(1)
        found[name] = torch.maximum(found.get(name, largest), largest)

    seen = {pair.second: lambda x, _, name=pair.second: see(name, x) for pair in pairs}
    watch(model, batches, seen)
    return found


def _conv(model: nn.Module, name: str) -> Conv:
    conv = model.get_submodule(name)
    assert isinstance(conv, Conv)
    return conv


def _row(link: _Link, imbalance: float) -> EqualizedPair:
    return EqualizedPair(
        first=link.pair.first,
        second=link.pair.second,
        smallest_scale=link.scales.min().item(),
        largest_scale=link.scales.max().item(),
        imbalance_before=imbalance,
        imbalance_after=link.imbalance(),
    )
