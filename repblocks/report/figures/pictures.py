"""Which pictures a report has: those that its facts have something for."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from repblocks.quantization.ranges import LayerRanges
from repblocks.report.blocks import BlockFacts
from repblocks.report.facts import Facts
from repblocks.report.figures import charts
from repblocks.report.figures.charts import Columns
from repblocks.report.figures.diagram import draw_block
from repblocks.report.figures.style import Theme
from repblocks.report.kernels import KernelFacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: More kernels than these make a picture that nobody reads, in a file that nobody opens.
KERNELS_SHOWN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure of the page.

    Attributes:
        name: Of its files, and of its place in the page.
        label: One sentence for those who cannot see it.
        draw: Draws it in a theme.
    """

    name: str
    label: str
    draw: Callable[[Theme], "Figure"]


def pictures(facts: Facts) -> dict[str, Picture]:
    """By name, in the page's order."""
    found = [
        *_of_blocks(facts.blocks),
        *_of_kernels(facts.kernels),
        *_of_ranges(facts.ranges.layers),
        *_of_training(facts.run.metrics, [block.name for block in facts.blocks]),
    ]
    return {picture.name: picture for picture in found}


def featured(blocks: Sequence[BlockFacts]) -> BlockFacts:
    """The block to draw: the first of those with the most branches."""
    return max(blocks, key=lambda block: len(block.anatomy.branches))


def _of_blocks(blocks: Sequence[BlockFacts]) -> list[Picture]:
    if not blocks:
        return []
    shown, shared = featured(blocks), [block for block in blocks if len(block.shares) > 1]
    found = [
        Picture(
            name="block",
            label=f"Block {shown.name} before and after: {len(shown.anatomy.branches)} branches become "
            f"{' and '.join(shown.result)}.",
            draw=partial(draw_block, shown),
        ),
        Picture(
            name="latency",
            label="Latency of each block in train form and in deploy form.",
            draw=partial(charts.draw_latency, blocks),
        ),
        Picture(
            name="border",
            label="Error of each block's fold at the border and in the interior.",
            draw=partial(charts.draw_border, blocks),
        ),
    ]
    if shared:
        label = "Share of each branch in the folded kernel of its block."
        found.append(Picture(name="shares", label=label, draw=partial(charts.draw_shares, shared)))
    return found


def _of_kernels(kernels: Sequence[KernelFacts]) -> list[Picture]:
    wide = [kernel for kernel in kernels if len(kernel.taps) * len(kernel.taps[0]) > 1][:KERNELS_SHOWN]
    rich = [kernel for kernel in kernels if len(kernel.singular_values) > 1 and kernel.singular_values[0] > 0]
    found = {
        "taps": (wide, "Energy of each tap of each collapsed kernel.", charts.draw_taps),
        "spectra": (rich, "Singular values of each collapsed kernel.", charts.draw_spectra),
    }
    return [
        Picture(name=name, label=label, draw=partial(draw, shown))
        for name, (shown, label, draw) in found.items()
        if shown
    ]


def _of_ranges(layers: Sequence[LayerRanges]) -> list[Picture]:
    label = "Range of the weights of each output channel, by layer."
    return [Picture(name="ranges", label=label, draw=partial(charts.draw_ranges, layers))] if layers else []


def _of_training(metrics: Columns, order: Sequence[str]) -> list[Picture]:
    curves, history = curves_in(metrics), shares_in(metrics, order)
    found: list[Picture] = []
    if curves:
        label = f"Training curves: {', '.join(curves)}."
        found.append(Picture(name="curves", label=label, draw=partial(charts.draw_curves, curves)))
    if history:
        label = "Share of each branch, epoch by epoch."
        found.append(Picture(name="share_history", label=label, draw=partial(charts.draw_share_history, history)))
    return found


def curves_in(metrics: Columns) -> dict[str, Columns]:
    """``PART/KIND`` columns by kind, and the learning rate."""
    kinds = defaultdict[str, dict[str, Sequence[float | None]]](dict)
    for name, values in metrics.items():
        part, _, kind = name.partition("/")
        if kind and part != "share" and any(value is not None for value in values):
            kinds[kind][part] = values
    if any(value is not None for value in metrics.get("lr", ())):
        kinds["learning rate"] = {"lr": metrics["lr"]}
    return dict(kinds)


def shares_in(metrics: Columns, order: Sequence[str]) -> dict[str, Columns]:
    """``share/BLOCK/BRANCH`` columns by block, those in ``order`` first."""
    blocks = defaultdict[str, dict[str, Sequence[float | None]]](dict)
    for name, values in metrics.items():
        what, _, rest = name.partition("/")
        block, _, branch = rest.rpartition("/")
        if what == "share" and branch and any(value is not None for value in values):
            blocks[block][branch] = values
    known = [name for name in order if name in blocks]
    return {name: blocks[name] for name in dict.fromkeys([*known, *blocks])}
