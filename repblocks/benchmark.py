"""Speed of a model's forms, and of timm's, in several runtimes: ratios of interleaved runs on one thread."""

import copy
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from repblocks.blocks import RepNeXtBlock
from repblocks.blocks.base import require_collapsible
from repblocks.deploy_form import deploy_form_of, has_blocks
from repblocks.errors import ConfigurationError, FoldError
from repblocks.files import replacing
from repblocks.images import random_images
from repblocks.profiling import latency_ms, profile
from repblocks.progress import Track, untracked
from repblocks.runtimes import opened, usable_runtimes
from repblocks.verification import verify

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "compare_forms",
    "compare_shortcuts",
    "draw",
    "has_shortcuts",
    "require_drawable",
    "twin_of",
    "usable_runtimes",
]

TIMMS_NAMES = {"repvit_m0_9": "repvit_m1"}
"""timm's names of layouts that it calls otherwise than their authors: its m1 has the 1x1's own BatchNorm."""

SIDES = ("train", "deploy", "timm")
"""What `compare_forms` compares."""

SHORTCUTS = ("absorb", "keep")
"""What a `RepNeXtBlock` can do with its shortcut."""

TIE = 0.02
"""Medians whose ratio is within this of 1 count as equally fast: repeated measurements differ by as much."""

Size = tuple[int, int, int]
Row = dict[str, Any]


def compare_forms(
    name: str, model: nn.Module, size: Size, *, runtimes: Sequence[str], batch: int = 1, repeats: int = 20
) -> list[Row]:
    """Median milliseconds of the train form, the deploy form and timm's reparameterized twin, in turns.

    Args:
        name: Shown.
        model: Any; what ships of it is what `repblocks.deploy_form.deploy_form_of` says. It is not changed.
        size: ``(channels, height, width)`` of an image.
        runtimes: Keys of ``RUNTIMES``.
        batch: Images at a time.
        repeats: Rounds, of which the median counts.

    Returns:
        A row per runtime: ``model``, ``runtime``, ``train_ms``, ``deploy_ms``, ``timm_ms`` and the ratios
        ``train_over_deploy`` and ``timm_over_deploy``; None where there is no twin, or no other form than the one
        that ships.

    Raises:
        FoldError: A block or region does not fold.
        VerificationError: What `repblocks.collapse` made of a model differs from it.
    """
    images, before = random_images(batch, size), copy.deepcopy(model).eval()
    shipped = deploy_form_of(before, images)
    twin = _twin(before, shipped.model, size)
    sides = {"train": before if shipped.differs_from(before) else None, "deploy": shipped.model, "timm": twin}
    with opened({side: module for side, module in sides.items() if module is not None}, images) as runs_in:
        return [_row(name, runtime, latency_ms(runs_in(runtime), images, repeats=repeats)) for runtime in runtimes]


def _row(name: str, runtime: str, times: Mapping[str, float]) -> Row:
    milliseconds = {side: times.get(side) for side in SIDES}
    ratios = {side: None if time is None else time / times["deploy"] for side, time in milliseconds.items()}
    return {
        "model": name,
        "runtime": runtime,
        **{f"{side}_ms": time for side, time in milliseconds.items()},
        **{f"{side}_over_deploy": ratios[side] for side in ("train", "timm")},
    }


def _twin(model: nn.Module, plain: nn.Module, size: Size) -> nn.Module | None:
    """What timm makes of a model of its own, or its network in the place of ours; None where it has none."""
    name, args = str(vars(model).get("model_name")), vars(model).get("model_args", {})
    if not has_blocks(model):
        return _reparameterized(model) if timm.is_model(name) else None
    twin = twin_of(name, **{key: args[key] for key in ("in_chans", "num_classes") if key in args})
    return twin if twin is not None and profile(twin, size).macs == profile(plain, size).macs else None


def _reparameterized(model: nn.Module) -> nn.Module | None:
    """None where that changes nothing."""
    twin = reparameterize_model(model)
    before, after = (sum(parameter.numel() for parameter in side.parameters()) for side in (model, twin))
    return twin if after < before else None


def twin_of(name: str, in_chans: int = 3, num_classes: int = 1000) -> nn.Module | None:
    """The model of the same name in timm, reparameterized; None where it has none."""
    theirs = name.removeprefix("rb_")
    theirs = TIMMS_NAMES.get(theirs, theirs)
    if not name.startswith("rb_") or not timm.is_model(theirs):
        return None
    return reparameterize_model(timm.create_model(theirs, in_chans=in_chans, num_classes=num_classes).eval())


def compare_shortcuts(
    model: nn.Module,
    size: Size,
    *,
    runtimes: Sequence[str],
    batch: int = 1,
    repeats: int = 20,
    track: Track = untracked,
) -> list[Row]:
    """Median milliseconds of the deploy forms with shortcuts absorbed and with shortcuts kept, in turns.

    Both come from the same weights and are compared with the train form first. The one with the smaller median is
    faster; within ``TIE`` of each other, neither is.

    Args:
        model: With blocks in train form that `has_shortcuts` finds; it is not changed.
        size: ``(channels, height, width)`` of an image.
        runtimes: Keys of ``RUNTIMES``.
        batch: Images at a time.
        repeats: Rounds, of which the median counts.
        track: Shows how far it is: ``track(runtimes, what)`` gives them again, one by one.

    Returns:
        A row per runtime: ``model``, ``runtime``, ``absorb_ms``, ``keep_ms``, their ratio ``keep_over_absorb``, and
        ``faster``, which is ``"absorb"``, ``"keep"`` or ``"tie"``.

    Raises:
        VerificationError: A deploy form differs from the train form.
    """
    images, before = random_images(batch, size), copy.deepcopy(model).eval()
    forms = {shortcut: _with_shortcuts(before, shortcut, images) for shortcut in SHORTCUTS}
    name = str(vars(model).get("model_name") or type(model).__name__)
    with opened(forms, images) as runs_in:
        return [
            {"model": name, "runtime": runtime, **_verdict(latency_ms(runs_in(runtime), images, repeats=repeats))}
            for runtime in track(runtimes, "comparing shortcuts")
        ]


def _with_shortcuts(model: nn.Module, shortcut: str, images: Tensor) -> nn.Module:
    twin = copy.deepcopy(model)
    for block in _shortcut_blocks(twin):
        block.shortcut = shortcut
    form = deploy_form_of(twin, images).model
    verify(model, form, images).raise_if_different(f'the deploy form with shortcut="{shortcut}"')
    return form


def _verdict(times: Mapping[str, float]) -> Row:
    absorb, keep = times["absorb"], times["keep"]
    is_tie = max(absorb, keep) <= (1 + TIE) * min(absorb, keep)
    faster = "tie" if is_tie else "absorb" if absorb < keep else "keep"
    return {"absorb_ms": absorb, "keep_ms": keep, "keep_over_absorb": keep / absorb, "faster": faster}


def has_shortcuts(model: nn.Module) -> bool:
    """Whether there are blocks in train form whose shortcut can be absorbed or kept."""
    return bool(_shortcut_blocks(model))


def _shortcut_blocks(model: nn.Module) -> list[RepNeXtBlock]:
    blocks = [module for module in model.modules() if isinstance(module, RepNeXtBlock) and module.form == "train"]
    return [block for block in blocks if _can_absorb(block)]


def _can_absorb(block: RepNeXtBlock) -> bool:
    """Whether its activation lets the shortcut through; a block that absorbs was checked when it was made."""
    twin = copy.deepcopy(block)
    twin.shortcut = "absorb"
    try:
        require_collapsible(twin)
    except FoldError:
        return False
    return True


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the medians, a chart for each model and a group for each runtime; the suffix chooses the format.

    A side that was not measured has no bar. Each chart has its own scale: what is compared is inside of it.

    Args:
        rows: Of `compare_forms`, of any number of models.
        path: The file, as ``.png``, ``.svg`` or ``.pdf``; it appears complete or not at all.

    Raises:
        CheckpointError: The file system refuses.
        ConfigurationError: As of `require_drawable`.
    """
    require_drawable(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = [[row for row in rows if row["model"] == model] for model in models]
    shown = [side for side in SIDES if any(row[f"{side}_ms"] is not None for row in rows)]
    with mpl.rc_context({"text.parse_math": False, "svg.hashsalt": "benchmark"}):
        figure = Figure(figsize=(7, 0.7 + 0.55 * len(groups) + 0.6 * len(rows)), layout="constrained")
        charts = figure.subplots(len(groups), squeeze=False, height_ratios=[len(group) for group in groups])
        for axes, model, group in zip(charts.flat, models, groups, strict=True):
            _draw_model(axes, model, group)
        charts[-1, 0].set_xlabel("milliseconds, median, one thread")
        patches = [Patch(color=_COLORS[side], label=_LABELS[side]) for side in shown]
        figure.legend(handles=patches, loc="outside upper left", ncols=len(shown), frameon=False)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150)


def require_drawable(path: Path) -> None:
    """Find out before anything is measured whether it can be drawn.

    Raises:
        ConfigurationError: matplotlib is not installed, or the suffix is none of a picture.
    """
    if find_spec("matplotlib") is None:
        raise ConfigurationError('a plot needs matplotlib; run: pip install "repblocks[report]"')
    if path.suffix not in _PICTURES:
        raise ConfigurationError(f"cannot draw {path}: needed is a name that ends in {', '.join(_PICTURES)}")


_PICTURES = (".png", ".svg", ".pdf")
_COLORS = {"train": "#2f5fc4", "deploy": "#c8641b", "timm": "#23866a"}
_LABELS = {"train": "train form", "deploy": "deploy form", "timm": "timm, reparameterized"}
_THICKNESS = 0.27
_LONGEST_TITLE = 70


def _draw_model(axes: "Axes", model: str, rows: Sequence[Mapping[str, Any]]) -> None:
    for place, row in enumerate(rows):
        times = {side: row[f"{side}_ms"] for side in SIDES if row[f"{side}_ms"] is not None}
        places = [place + _THICKNESS * (i - (len(times) - 1) / 2) for i in range(len(times))]
        colors = [_COLORS[side] for side in times]
        bars = axes.barh(places, list(times.values()), height=0.9 * _THICKNESS, color=colors)
        axes.bar_label(bars, fmt=_in_short, padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row["runtime"] for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    title = model if len(model) <= _LONGEST_TITLE else f"…{model[1 - _LONGEST_TITLE :]}"
    axes.set_title(title, loc="left", fontsize=10)


def _in_short(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
