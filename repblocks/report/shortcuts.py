"""Shortcuts absorbed or kept: which deploy form is faster where the report is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from repblocks.benchmark import compare_shortcuts, has_shortcuts, usable_runtimes
from repblocks.errors import VerificationError
from repblocks.progress import Track, untracked

#: Compiling takes longer than all that a report measures.
LEFT_OUT = ("compile",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortcutFacts:
    """The two deploy forms of a model whose blocks can absorb their shortcuts.

    Attributes:
        rows: Of `repblocks.benchmark.compare_shortcuts`, one for each installed runtime.
        repeats: Rounds of which the medians are.
        difference: Why nothing was timed: how a form differs from the train form; empty where both are equal.
    """

    rows: tuple[Mapping[str, Any], ...]
    repeats: int
    difference: str = ""


def measure_shortcuts(
    model: nn.Module, size: tuple[int, int, int], *, repeats: int = 10, track: Track = untracked
) -> ShortcutFacts | None:
    """Both forms timed in the installed runtimes that take the model, but for the compiler; None without such blocks.

    Args:
        model: In eval mode, on the CPU; it is not changed.
        size: ``(channels, height, width)`` of an image.
        repeats: Rounds, of which the median counts.
        track: Shows how far it is.
    """
    if not has_shortcuts(model):
        return None
    timed = partial(compare_shortcuts, model, size, repeats=repeats, track=track)
    try:
        rows = _in_each_runtime(timed)
    except VerificationError as error:
        return ShortcutFacts(rows=(), repeats=repeats, difference=str(error))
    return ShortcutFacts(rows=tuple(rows), repeats=repeats)


def _in_each_runtime(timed: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """In PyTorch alone where the model cannot be written as a graph."""
    try:
        return timed(runtimes=[name for name in usable_runtimes() if name not in LEFT_OUT])
    except torch.onnx.OnnxExporterError:
        return timed(runtimes=["eager"])
