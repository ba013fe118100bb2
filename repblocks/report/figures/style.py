"""How figures look, and how they become files: in fixed colours, or in those that the page's style sheet gives."""

import io
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repblocks.errors import ConfigurationError
from repblocks.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Dots per inch of PNG files.
RESOLUTION = 200
#: On the page; figures of the common width fill it.
PIXELS_PER_POINT = 1.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours by meaning: text, lesser text, thin lines, the background, and what tells series apart."""

    ink: str
    muted: str
    rule: str
    surface: str
    series: tuple[str, ...]


LIGHT = Theme(
    ink="#17202c",
    muted="#5a6675",
    rule="#d5dbe3",
    surface="#ffffff",
    series=("#2f5fc4", "#c8641b", "#23866a", "#8452b0", "#a8811a", "#b83a61", "#3d7f95", "#6a6f2a"),
)

_SERIES = {f"#0b000{at}": f"var(--series-{at})" for at in range(len(LIGHT.series))}
_VARIABLES = {
    "#0a0001": "currentColor",
    "#0a0002": "var(--muted)",
    "#0a0003": "var(--rule)",
    "#0a0004": "var(--surface)",
    **_SERIES,
}
#: Colours that occur nowhere else, so that the page can put its own in their places.
PAGE = Theme(ink="#0a0001", muted="#0a0002", rule="#0a0003", surface="#0a0004", series=tuple(_SERIES))

Draw = Callable[[Theme], "Figure"]


def inline_svg(name: str, label: str, draw: Draw) -> str:
    """A figure as an ``<svg>`` element in the page's colours and font, the same for the same figure.

    Args:
        name: Makes ids unique within the page.
        label: What a screen reader says.
        draw: Draws it in a theme.
    """
    from markupsafe import escape

    svg = _svg(name, PAGE, draw)
    svg = re.sub(r"#0[ab]000\d", lambda found: _VARIABLES[found[0]], svg)
    svg = re.sub(r"(font: [^;\"]*?\d+(?:\.\d+)?px) [^;\"]+", r"\1 var(--font)", svg)
    svg = re.sub(r'((?:\bid|xlink:href)="#?|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    head = re.search(r'<svg [^>]*?(viewBox="0 0 ([\d.]+) [\d.]+")[^>]*>', svg)
    assert head is not None
    width = f"max-width: {PIXELS_PER_POINT * float(head[2]):.0f}px"
    names = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} {head[1]} style="{width}" role="img" aria-label="{escape(label)}">{svg[head.end() :]}'


def write_files(name: str, draw: Draw, folder: Path) -> list[Path]:
    """Write ``name.svg`` and ``name.png`` in light colours.

    Raises:
        CheckpointError: The file system refuses.
    """
    vector, pixels = folder / f"{name}.svg", folder / f"{name}.png"
    with replacing(vector) as temporary:
        temporary.write_text(_svg(name, LIGHT, draw), encoding="utf-8")
    with replacing(pixels) as temporary, _styled(name, LIGHT):
        draw(LIGHT).savefig(temporary, format="png", dpi=RESOLUTION, metadata={"Software": None})
    return [vector, pixels]


def _svg(name: str, theme: Theme, draw: Draw) -> str:
    file = io.StringIO()
    nothing: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _styled(name, theme):
        draw(theme).savefig(file, format="svg", metadata=nothing)
    return file.getvalue()


@contextmanager
def _styled(name: str, theme: Theme) -> Generator[None]:
    """Matplotlib's settings, for drawing and for saving."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigurationError('a report needs matplotlib; run: pip install "repblocks[report]"') from error
    from cycler import cycler

    settings: Any = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",  # text stays text: it can be selected, and takes the page's font
        "text.parse_math": False,  # names of modules and classes may hold dollars
        "font.size": 9.5,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.edgecolor": theme.rule,
        "axes.facecolor": "none",
        "axes.labelcolor": theme.muted,
        "axes.prop_cycle": cycler(color=theme.series),
        "figure.facecolor": theme.surface if theme is LIGHT else "none",
        "grid.color": theme.rule,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "text.color": theme.ink,
        "xtick.color": theme.rule,
        "xtick.labelcolor": theme.muted,
        "ytick.color": theme.rule,
        "ytick.labelcolor": theme.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "savefig.facecolor": "auto",
        "savefig.bbox": None,
    }
    with mpl.rc_context(settings):
        yield


def figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches, whose parts do not overlap."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def list_names(axes: "Axes", names: list[str]) -> None:
    """Rows of a chart: names on the left, the first at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def legend_above(axes: "Axes", columns: int) -> None:
    """The series' names in a line above the axes."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.3,
        handlelength=1.2,
        columnspacing=1.4,
        borderpad=0,
    )
