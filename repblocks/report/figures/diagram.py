"""A block before and after the collapse, as boxes and lines."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from repblocks.report.anatomy import Anatomy
from repblocks.report.blocks import BlockFacts
from repblocks.report.figures.style import Theme, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: In the units of the drawing: a box, the distance of branches, and that of layers.
BOX, APART, STEP = (1.36, 0.44), 1.62, 0.78
DEPLOY_WIDTH = 3.4


def draw_block(facts: BlockFacts, theme: Theme) -> "Figure":
    """Train form on the left, deploy form on the right."""
    form, result = facts.anatomy, facts.result
    width = max(len(form.branches), 1) * APART
    deepest = max(len(branch.layers) for branch in form.branches)
    height = STEP * (deepest + _rows(form.before) + _rows(form.after) + 2)
    drawing = figure(min(9.6, 0.62 * (width + DEPLOY_WIDTH + 2.2)), 0.62 * (height + 0.5))
    axes = drawing.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(-0.1, width + DEPLOY_WIDTH + 2.1)
    axes.set_ylim(-height - 0.1, 0.55)
    pen = Pen(axes, theme)
    pen.text(width / 2, 0.32, "train form", theme.ink, weight="bold")
    _draw_train_form(pen, form, width, deepest)
    _draw_fold(pen, width + 0.15, width + 1.75, -height / 2)
    middle = width + 2.0 + DEPLOY_WIDTH / 2
    pen.text(middle, 0.32, "deploy form", theme.ink, weight="bold")
    pen.chain(middle, 0, -height, [(words, theme.series[1]) for words in result], width=DEPLOY_WIDTH)
    return drawing


def _rows(layers: Sequence[str]) -> float:
    """The room for a chain of layers; for none, that of a short line."""
    return len(layers) + 1 if layers else 0.4


class Pen:
    """Draws boxes and lines on axes."""

    def __init__(self, axes: "Axes", theme: Theme) -> None:
        self.axes, self.theme = axes, theme

    def text(self, x: float, y: float, words: str, color: str, *, size: float = 8.5, weight: str = "normal") -> None:
        """Centred."""
        self.axes.text(x, y, words, color=color, ha="center", va="center", fontsize=size, fontweight=weight)

    def line(self, points: Sequence[tuple[float, float]]) -> None:
        """Through these points."""
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=self.theme.muted, linewidth=1.1, solid_capstyle="round", zorder=1)

    def arrow(self, x: float, top: float, bottom: float) -> None:
        """Downwards."""
        self.axes.annotate(
            "",
            (x, bottom),
            (x, top),
            arrowprops={"arrowstyle": "-|>", "color": self.theme.muted, "lw": 1.1, "shrinkA": 0, "shrinkB": 0},
        )

    def box(self, x: float, y: float, words: str, color: str, *, width: float = BOX[0]) -> None:
        """A layer."""
        from matplotlib.patches import FancyBboxPatch

        corner = (x - width / 2, y - BOX[1] / 2)
        shape = FancyBboxPatch(corner, width, BOX[1], boxstyle="round,pad=0,rounding_size=0.09", zorder=2)
        shape.set(facecolor=(*_rgb(color), 0.14), edgecolor=color, linewidth=1.0)
        self.axes.add_patch(shape)
        self.text(x, y - 0.01, words, self.theme.ink, size=8)

    def chain(
        self, x: float, top: float, bottom: float, layers: Sequence[tuple[str, str]], *, width: float = BOX[0]
    ) -> None:
        """Layers, each with its colour, evenly on an arrow from ``top`` to ``bottom``."""
        gap = (top - bottom) / (len(layers) + 1)
        ends = [top, *(top - gap * (at + 1) for at in range(len(layers))), bottom]
        for at in range(len(ends) - 1):
            start = ends[at] - (BOX[1] / 2 if at else 0)
            stop = ends[at + 1] + (BOX[1] / 2 if at + 1 < len(ends) - 1 else 0)
            self.arrow(x, start, stop)
        for y, (words, color) in zip(ends[1:-1], layers, strict=True):
            self.box(x, y, words, color, width=width)


def _colored(layers: Sequence[str], theme: Theme) -> list[tuple[str, str]]:
    """Layers by kind: convolutions, norms, and others."""
    return [(words, _color(words, theme)) for words in layers]


def _color(words: str, theme: Theme) -> str:
    if words == "BatchNorm":
        return theme.series[2]
    return theme.series[0] if "conv" in words else theme.muted


def _draw_train_form(pen: Pen, form: Anatomy, width: float, deepest: int) -> None:
    centre = width / 2
    fork = -STEP * _rows(form.before)
    join = fork - STEP * (deepest + 1)
    bottom = join - STEP * (_rows(form.after) + 0.6)
    if form.before:
        pen.chain(centre, 0, fork, _colored(form.before, pen.theme))
    else:
        pen.line([(centre, 0), (centre, fork)])
    for at, branch in enumerate(form.branches):
        x = (at + 0.5) * APART
        pen.line([(centre, fork), (x, fork)])
        _draw_branch(pen, x, fork, join, branch.layers)
        pen.line([(x, join), (centre, join)])
    if len(form.branches) > 1:
        _draw_junction(pen, centre, join, form.joined)
    below = join - (0.2 if len(form.branches) > 1 else 0)
    pen.chain(centre, below, bottom, _colored(form.after, pen.theme))


def _draw_branch(pen: Pen, x: float, top: float, bottom: float, layers: Sequence[str]) -> None:
    gap = (top - bottom) / (len(layers) + 1)
    pen.line([(x, top), (x, bottom)])
    for at, words in enumerate(layers):
        _draw_opaque(pen, x, top - gap * (at + 1), words, _color(words, pen.theme))
    if not layers:
        pen.text(x + 0.42, (top + bottom) / 2, "identity", pen.theme.muted, size=8)


def _draw_opaque(pen: Pen, x: float, y: float, words: str, color: str) -> None:
    """A box that hides the line behind it, whatever the background of the page is."""
    from matplotlib.patches import Rectangle

    hidden = Rectangle((x - BOX[0] / 2, y - BOX[1] / 2), *BOX, facecolor=pen.theme.surface, linewidth=0, zorder=1.5)
    pen.axes.add_patch(hidden)
    pen.box(x, y, words, color)


def _draw_junction(pen: Pen, x: float, y: float, joined: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    half = 0.2 if joined == "+" else 0.42
    shape = FancyBboxPatch((x - half, y - 0.2), 2 * half, 0.4, boxstyle="round,pad=0,rounding_size=0.2", zorder=3)
    shape.set(facecolor=pen.theme.surface, edgecolor=pen.theme.muted, linewidth=1.1)
    pen.axes.add_patch(shape)
    pen.axes.text(x, y - 0.01, joined, color=pen.theme.ink, ha="center", va="center", fontsize=9, zorder=4)


def _draw_fold(pen: Pen, left: float, right: float, y: float) -> None:
    color = pen.theme.series[1]
    pen.axes.annotate("", (right, y), (left, y), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2})
    pen.text((left + right) / 2, y + 0.3, "fold", color, size=9.5, weight="bold")
    pen.text((left + right) / 2, y - 0.3, "exact", color, size=8)


def _rgb(color: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(color)
