"""What a model remembers of its expansions, in plain values: with them a file can say how to repeat them."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from repblocks.expansion.expanded import ExpandedConv
from repblocks.expansion.report import ExpansionReport

Recipe = Sequence[dict[str, Any]]
"""One dict per call of `expand`: ``block`` and ``init`` as given, and the names of its ``convolutions``."""

_ATTRIBUTE = "expansions"


def recipe_of(model: nn.Module) -> Recipe:
    """The expansions that made a model, in order; none where nothing in it is expanded any more."""
    expanded = any(isinstance(module, ExpandedConv) for module in model.modules())
    return vars(model).get(_ATTRIBUTE, []) if expanded else []


def remember(model: nn.Module, earlier: Recipe, report: ExpansionReport) -> None:
    """Note on a model the expansions that made it: earlier ones, then that of the report."""
    step = {"block": report.block, "init": report.init, "convolutions": [row.name for row in report.expanded]}
    vars(model)[_ATTRIBUTE] = [*earlier, step] if report.expanded else list(earlier)


def is_recipe(value: object) -> bool:
    """Whether a value, read from a file, has the form of a recipe."""
    return isinstance(value, list) and all(_is_step(step) for step in cast("list[object]", value))


def _is_step(value: object) -> bool:
    step = cast("dict[str, Any]", value if isinstance(value, dict) else {})
    names = step.get("convolutions")
    words = [step.get("block"), step.get("init"), *(cast("list[object]", names) if isinstance(names, list) else [None])]
    return all(isinstance(word, str) for word in words)
