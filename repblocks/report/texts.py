"""Numbers as people read them, and what the page says in words."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from repblocks.report.facts import Facts
from repblocks.report.words import size

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One line of the summary: a quantity in both forms.

    Attributes:
        what: The quantity.
        train, deploy: In words; ``train`` is empty where there is one form.
        change: What the collapse does to it, in words.
    """

    what: str
    train: str
    deploy: str
    change: str


def cards(facts: Facts) -> list[Card]:
    """The summary: accuracy if a run measured it, parameters, MACs and latency."""
    forms = {name: facts.run.summary[name] for name in ("train", "deploy") if name in facts.run.summary}
    found = [_accuracy(forms)] if {"train", "deploy"} <= forms.keys() else []
    quantities: Mapping[str, tuple[str, Callable[[Any], str]]] = {
        "parameters": ("params", si),
        "MACs per image": ("macs", si),
        "latency per image": ("latency_ms", ms),
    }
    return found + [_card(facts, what, field, show) for what, (field, show) in quantities.items()]


def notes(facts: Facts) -> list[str]:
    """What a reader should know before believing the numbers."""
    found: list[str] = []
    if facts.run.config.get("config", {}).get("reestimate_bn"):
        found.append(
            "The run re-estimated BatchNorm after training. Blocks and kernels below are those of the checkpoint, "
            "before that; the accuracy and the deploy files are from after it."
        )
    if not facts.blocks and facts.train is None:
        found.append("The model has one form only, so there is nothing to compare: it is shown as it ships.")
    return found


def training(facts: Facts) -> dict[str, str]:
    """How the model was trained, as far as the run says."""
    summary = facts.run.summary
    best = (summary.get("checkpoint") or {}).get("val_accuracy")
    seconds = (summary.get("seconds") or {}).get("fit")
    values = {
        "data": summary.get("data"),
        "images": ", ".join(f"{number:,} {part}" for part, number in (summary.get("images") or {}).items()),
        "epochs": summary.get("epochs"),
        "seed": summary.get("seed"),
        "best validation accuracy": None if best is None else percent(best, 2),
        "training time": None if seconds is None else f"{seconds:,.0f} s",
    }
    return {name: str(value) for name, value in values.items() if value not in (None, "")}


def remark(file: Mapping[str, Any]) -> str:
    """What is special about a deploy file."""
    found = [f"opset {file['opset']}"] if "opset" in file else []
    accuracy = file.get("int8_accuracy")
    if accuracy is not None:
        found.append(
            f"{percent(accuracy, 2)} right of {file['labelled_images']} images, "
            f"in float {percent(file['float_accuracy'], 2)}"
        )
    return ", ".join(found)


def recommendation(row: Mapping[str, Any]) -> str:
    """What to do with shortcuts in a runtime, by a row of `repblocks.benchmark.compare_shortcuts`."""
    return "a tie: either" if row["faster"] == "tie" else f'shortcut="{row["faster"]}"'


def _accuracy(forms: Mapping[str, Mapping[str, Any]]) -> Card:
    train, deploy = (forms[name]["test_accuracy"] for name in ("train", "deploy"))
    change = _signed(100 * (deploy - train), 2, " points")
    return Card(what="test accuracy", train=percent(train, 2), deploy=percent(deploy, 2), change=change)


def _card(facts: Facts, what: str, field: str, show: Callable[[Any], str]) -> Card:
    deploy = getattr(facts.deploy, field)
    if facts.train is None:
        return Card(what=what, train="", deploy=show(deploy), change="")
    train = getattr(facts.train, field)
    faster = f"{train / deploy:.2f} times as fast" if field == "latency_ms" and deploy else ""
    change = faster or (_signed(100 * (deploy / train - 1), 1, "%") if train else "")
    return Card(what=what, train=show(train), deploy=show(deploy), change=change)


def _signed(value: float, digits: int, unit: str) -> str:
    if not round(value, digits):
        return "the same"
    return f"{value:+.{digits}f}{unit}".replace("-", "−")  # noqa: RUF001 - a minus as wide as the plus


def si(value: float) -> str:
    """Three digits and a letter: 16.1 M."""
    for unit, letter in _PREFIXES:
        if abs(value) >= unit:
            return f"{value / unit:.3g} {letter}" if abs(value) < 999.5 * unit else f"{value / unit:,.0f} {letter}"
    return f"{value:g}"


def count(value: float) -> str:
    """All digits, in groups."""
    return f"{value:,}"


def ms(value: float) -> str:
    """Milliseconds."""
    return f"{value:.2f} ms" if value >= 0.1 else f"{value:.3f} ms"


def bare_ms(value: float) -> str:
    """Milliseconds without the unit, for a column that has it in its title."""
    return f"{value:.3f}"


def scientific(value: float) -> str:
    """Two digits and an exponent; 0 as it is."""
    return f"{value:.1e}" if value else "0"


def decibels(value: float) -> str:
    """One digit behind the point; a rounding without any error has none."""
    return f"{value:.1f}" if math.isfinite(value) else "no error"


def percent(value: float, digits: int = 1) -> str:
    """Of one."""
    return f"{100 * value:.{digits}f}%"


def short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}".replace("-", "−")  # noqa: RUF001 - a minus


def ratio(value: float) -> str:
    """A factor."""
    return f"{value:.2f}" if math.isfinite(value) else "∞"


FILTERS: dict[str, Callable[..., str]] = {
    "si": si,
    "count": count,
    "ms": ms,
    "bare_ms": bare_ms,
    "scientific": scientific,
    "decibels": decibels,
    "percent": percent,
    "ratio": ratio,
    "short": short,
    "recommendation": recommendation,
    "remark": remark,
    "size": size,
}
