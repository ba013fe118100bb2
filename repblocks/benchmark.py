"""Speed of a model's forms, and of timm's, in several runtimes: ratios of interleaved runs on one thread."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from repblocks.blocks.base import deployed
from repblocks.profiling import latency_ms
from repblocks.runtimes import opened, usable_runtimes

__all__ = ["compare_forms", "draw", "twin_of", "usable_runtimes"]

TIMMS_NAMES = {"repvit_m0_9": "repvit_m1"}
"""timm's names of layouts that it calls otherwise than their authors: its m1 has the 1x1's own BatchNorm."""


def compare_forms(
    name: str,
    model: nn.Module,
    size: tuple[int, int, int],
    *,
    runtimes: Sequence[str],
    batch: int = 1,
    repeats: int = 20,
) -> list[dict[str, Any]]:
    """Median milliseconds of the train form, the deploy form and timm's reparameterized twin, in turns.

    Args:
        name: Shown, and the name by which timm's twin is looked for.
        model: In train form; it is not changed.
        size: ``(channels, height, width)`` of an image.
        runtimes: Keys of ``RUNTIMES``.
        batch: Images at a time.
        repeats: Rounds, of which the median counts.

    Returns:
        A row per runtime: ``model``, ``runtime``, ``train_ms``, ``deploy_ms``, ``timm_ms`` and the ratios
        ``train_over_deploy`` and ``timm_over_deploy``; None where there is no twin.
    """
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    eager = copy.deepcopy(model).eval()
    sides: dict[str, nn.Module] = {"train": eager, "deploy": deployed(eager)}
    if (twin := twin_of(name, size[0])) is not None:
        sides["timm"] = twin
    return [_row(name, runtime, sides, images, repeats) for runtime in runtimes]


def twin_of(name: str, in_chans: int = 3) -> nn.Module | None:
    """The model of the same name in timm, reparameterized; None where it has none."""
    theirs = name.removeprefix("rb_")
    theirs = TIMMS_NAMES.get(theirs, theirs)
    if not name.startswith("rb_") or not timm.is_model(theirs):
        return None
    return reparameterize_model(timm.create_model(theirs, in_chans=in_chans).eval())


def _row(name: str, runtime: str, sides: Mapping[str, nn.Module], images: torch.Tensor, repeats: int) -> dict[str, Any]:
    times = latency_ms(opened(runtime, sides, images), images, repeats=repeats)
    deploy, twin = times["deploy"], times.get("timm")
    return {
        "model": name,
        "runtime": runtime,
        "train_ms": times["train"],
        "deploy_ms": deploy,
        "timm_ms": twin,
        "train_over_deploy": times["train"] / deploy,
        "timm_over_deploy": None if twin is None else twin / deploy,
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the medians, a group for each model and runtime; the suffix of ``path`` chooses the format."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 0.8 + 0.6 * len(rows)), layout="constrained")
    for i, side in enumerate(("train", "deploy", "timm")):
        times = [row[f"{side}_ms"] or 0.0 for row in rows]
        axes.barh([place + 0.27 * i for place in range(len(rows))], times, height=0.25, label=side)
    axes.set_yticks([place + 0.27 for place in range(len(rows))], [f"{row['model']}\n{row['runtime']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, median, one thread")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
