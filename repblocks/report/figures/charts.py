"""Charts of blocks and kernels."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import quantiles
from typing import TYPE_CHECKING

from repblocks.quantization.ranges import LayerRanges
from repblocks.report.blocks import BlockFacts
from repblocks.report.figures.style import Theme, figure, legend_above, list_names
from repblocks.report.kernels import KernelFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Columns = Mapping[str, Sequence[float | None]]

WIDTH = 8.6
ROW = 0.23
#: Where zero is drawn on a logarithmic axis of errors.
NO_ERROR = 1e-9
#: Smaller singular values, relative to the largest, count as none.
LEAST_VALUE = 1e-6
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw_shares(blocks: Sequence[BlockFacts], theme: Theme) -> "Figure":
    """Each branch's share of the folded kernel, as bars that fill the line."""
    drawing, axes = _with_rows([block.name for block in blocks])
    names = list(dict.fromkeys(branch for block in blocks for branch in block.shares))
    starts = [0.0] * len(blocks)
    for at, name in enumerate(names):
        widths = [block.shares.get(name, 0.0) for block in blocks]
        color, alpha = theme.series[at % len(theme.series)], 1 if at < len(theme.series) else 0.55
        axes.barh(range(len(blocks)), widths, left=starts, height=0.72, color=color, alpha=alpha, label=name)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    _as_percent(axes, "share of the folded kernel (Frobenius norms)")
    axes.spines["left"].set_visible(False)
    legend_above(axes, 6)
    return drawing


def draw_latency(blocks: Sequence[BlockFacts], theme: Theme) -> "Figure":
    """Both forms of each block on one line."""
    drawing, axes = _with_rows([block.name for block in blocks])
    train, deploy = ([getattr(block, form).latency_ms for block in blocks] for form in ("train", "deploy"))
    rows = range(len(blocks))
    axes.hlines(rows, deploy, train, color=theme.rule, linewidth=3, zorder=1)
    axes.scatter(train, rows, s=26, color=theme.series[0], label="train form", zorder=2)
    axes.scatter(deploy, rows, s=26, color=theme.series[1], label="deploy form", zorder=2)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds for one image on one CPU thread, median")
    axes.grid(axis="x")
    legend_above(axes, 2)
    return drawing


def draw_border(blocks: Sequence[BlockFacts], theme: Theme) -> "Figure":
    """The fold's error at the border and inside, and what another padding would change there."""
    drawing, axes = _with_rows([block.name for block in blocks])
    rows = range(len(blocks))
    inside, border = ([max(getattr(block.error, at), NO_ERROR) for block in blocks] for at in ("interior", "border"))
    other = {row: block.padding_effect for row, block in enumerate(blocks) if block.padding_effect}
    axes.scatter(inside, rows, s=26, color=theme.series[0], label="fold, interior", zorder=3)
    axes.scatter(
        border,
        rows,
        s=30,
        facecolors="none",
        edgecolors=theme.series[0],
        linewidths=1.4,
        label="fold, border",
        zorder=3,
    )
    axes.scatter(
        list(other.values()), list(other), s=26, marker="D", color=theme.series[1], label="other padding, border"
    )
    limit = blocks[0].error.tolerance
    axes.axvline(limit, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(limit, -0.75, " counts as equal up to here", color=theme.muted, fontsize=8, va="bottom", ha="left")
    axes.set_xscale("log")
    axes.set_xlim(NO_ERROR / 2, 3)
    _in_decades(axes.xaxis)
    axes.set_xlabel("largest difference, relative to the largest output of the block")
    axes.grid(axis="x")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=1.4, handletextpad=0.3)
    return drawing


def draw_taps(kernels: Sequence[KernelFacts], theme: Theme) -> "Figure":
    """Every kernel as a grid of taps, the darker the larger its weights there, as a root of their squares."""
    columns = min(8, len(kernels))
    rows = math.ceil(len(kernels) / columns)
    drawing = figure(WIDTH if columns > 4 else 1.5 * columns, 1.32 * rows)
    grid = drawing.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(kernels) :]:
        axes.set_axis_off()
    for axes, kernel in zip(grid.flat, kernels, strict=False):
        _draw_kernel(axes, kernel, theme)
    return drawing


def _draw_kernel(axes: "Axes", kernel: KernelFacts, theme: Theme) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    height, width = len(kernel.taps), len(kernel.taps[0])
    strongest = max(max(row) for row in kernel.taps) or 1.0
    cells = [Rectangle((x, y), 1, 1) for y in range(height) for x in range(width)]
    shades = [to_rgba(theme.series[0], math.sqrt(share / strongest)) for row in kernel.taps for share in row]
    axes.add_collection(PatchCollection(cells, facecolors=shades, edgecolors=theme.rule, linewidths=0.6))
    if height * width <= 9:
        _write_shares(axes, kernel, theme)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(_short(kernel.name), fontsize=7.5, loc="center", color=theme.muted, pad=3)


def _write_shares(axes: "Axes", kernel: KernelFacts, theme: Theme) -> None:
    strongest = max(max(row) for row in kernel.taps)
    for y, row in enumerate(kernel.taps):
        for x, share in enumerate(row):
            color = theme.surface if share > 0.4 * strongest else theme.ink
            axes.text(x + 0.5, y + 0.52, f"{100 * share:.0f}", color=color, ha="center", va="center", fontsize=7)


def draw_spectra(kernels: Sequence[KernelFacts], theme: Theme) -> "Figure":
    """Singular values of each kernel relative to its largest, from the first layer (faint) to the last."""
    drawing = figure(WIDTH, 3.3)
    axes = drawing.add_subplot()
    for at, kernel in enumerate(kernels):
        values = [value / kernel.singular_values[0] for value in kernel.singular_values if value > 0]
        places = [(i + 0.5) / len(kernel.singular_values) for i in range(len(values))]
        depth = at / max(len(kernels) - 1, 1)
        label = kernel.name if at in (0, len(kernels) - 1) else None
        axes.plot(places, values, color=theme.series[0], alpha=0.2 + 0.8 * depth, linewidth=1.3, label=label)
    axes.set_yscale("log")
    axes.set_ylim(max(axes.get_ylim()[0], LEAST_VALUE), 1.3)
    _in_decades(axes.yaxis, (1, 2, 5) if axes.get_ylim()[0] > 1e-2 else (1,))
    axes.set_xlim(0, 1)
    axes.set_ylabel("relative to the largest")
    _as_percent(axes, "singular values, from the largest to the smallest")
    axes.grid(axis="y")
    legend_above(axes, 2)
    return drawing


def draw_ranges(layers: Sequence[LayerRanges], theme: Theme) -> "Figure":
    """For each layer, over its output channels: the range of the weights that int8 has to hold."""
    drawing, axes = _with_rows([layer.name for layer in layers])
    rows = range(len(layers))
    smallest, lower, median, upper, largest = zip(*map(_quartiles, layers), strict=True)
    axes.hlines(rows, smallest, largest, color=theme.series[0], linewidth=1.2, alpha=0.55, label="all channels")
    axes.hlines(rows, lower, upper, color=theme.series[0], linewidth=6, alpha=0.55, label="middle half")
    axes.scatter(median, rows, s=20, color=theme.ink, zorder=3, label="median")
    axes.scatter(largest, rows, s=26, marker="|", color=theme.series[1], zorder=3, label="largest")
    axes.set_xscale("log")
    _in_decades(axes.xaxis, (1, 2, 5) if max(largest) < 200 * min(smallest) else (1,))
    axes.set_xlabel("largest absolute weight of an output channel")
    axes.grid(axis="x")
    legend_above(axes, 4)
    return drawing


def _quartiles(layer: LayerRanges) -> list[float]:
    """Minimum, quartiles and maximum over the channels that are not all zeros; a logarithmic axis has no zero."""
    ranges = [channel for channel in layer.channel_ranges if channel > 0] or [NO_ERROR]
    middle = quantiles(ranges, n=4, method="inclusive") if len(ranges) > 1 else 3 * ranges
    return [min(ranges), *middle, max(ranges)]


def draw_curves(curves: Mapping[str, Columns], theme: Theme) -> "Figure":
    """One chart for each kind of metric, the parts (train, val) as lines over epochs."""
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    drawing = figure(WIDTH * columns / 3 if columns < 3 else WIDTH, 2.5 * rows)
    grid = drawing.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    for axes, (kind, lines) in zip(grid.flat, curves.items(), strict=False):
        _draw_lines(axes, lines, dict(zip(lines, theme.series, strict=False)))
        axes.set_title(kind, color=theme.ink, pad=18)
        axes.set_xlabel("epoch")
        if kind == "accuracy":
            axes.yaxis.set_major_formatter(_percent)
        if len(lines) > 1:
            legend_above(axes, 3)
    return drawing


def draw_share_history(history: Mapping[str, Columns], theme: Theme) -> "Figure":
    """One small chart per block: its branches' shares over the epochs."""
    columns = min(4, len(history))
    rows = math.ceil(len(history) / columns)
    drawing = figure(WIDTH, 0.35 + 1.55 * rows)
    grid = drawing.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    colors = dict(zip(dict.fromkeys(name for lines in history.values() for name in lines), cycle(theme.series)))
    for axes in grid.flat[len(history) :]:
        axes.set_axis_off()
    for axes, (block, lines) in zip(grid.flat, history.items(), strict=False):
        _draw_lines(axes, lines, colors)
        axes.set_title(_short(block, 26), fontsize=8, color=theme.muted)
        axes.yaxis.set_major_formatter(_percent)
    grid[0, 0].set_ylim(bottom=0)
    handles = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawing.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=6, handlelength=1.2)
    return drawing


def _draw_lines(axes: "Axes", lines: Columns, colors: Mapping[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name, values in lines.items():
        points = [(epoch, value) for epoch, value in enumerate(values, start=1) if value is not None]
        epochs, heights = zip(*points, strict=True)
        axes.plot(epochs, heights, color=colors[name], label=name, marker="o" if len(points) < 3 else "", markersize=4)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _with_rows(names: list[str]) -> tuple["Figure", "Axes"]:
    """A figure with a row for each name."""
    drawing = figure(WIDTH, 0.9 + ROW * len(names))
    axes = drawing.add_subplot()
    list_names(axes, names)
    return drawing, axes


def _percent(value: float, position: float) -> str:
    return f"{100 * value:.0f}%"


def _in_decades(axis: "Axis", steps: Sequence[float] = (1.0,)) -> None:
    """Ticks of a logarithmic axis: these steps of each decade, written without matplotlib's formulas."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=steps, numticks=14))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: _power(value))


def _power(value: float) -> str:
    exponent = f"{value:.0e}".partition("e")[2]
    short = 1e-3 <= value < 1e4
    return f"{value:g}" if short else f"10{str(int(exponent)).translate(_RAISED)}"


def _as_percent(axes: "Axes", label: str) -> None:
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(_percent)
    axes.set_xlabel(label)


def _short(name: str, length: int = 16) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"
