"""What a report is about: a model, or a run folder with the model and what was recorded about it."""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from torch import nn

from repblocks.checkpoint import load
from repblocks.errors import CheckpointError
from repblocks.export import manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run of train.py left in its folder; what it did not write is empty.

    Attributes:
        config: ``run.yaml``.
        summary: ``summary.json``.
        metrics: The columns of ``metrics.csv``, each a value per epoch; None where an epoch has none.
        manifest: ``deploy/deploy.json``, whose structure is checked.
    """

    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    summary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metrics: Mapping[str, list[float | None]] = field(default_factory=dict[str, list[float | None]])
    manifest: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model to report on.

    Attributes:
        title: Its name.
        model: In eval mode, on the CPU.
        run: The run that it comes from; an empty one where it comes from none.
    """

    title: str
    model: nn.Module
    run: Run


def read_source(source: nn.Module | str | Path) -> Source:
    """The model of a run folder, a deploy folder, a checkpoint or a ``.safetensors`` file; or a model as it is.

    Raises:
        CheckpointError: There is nothing at the path, it is no such file or folder, or it is damaged.
    """
    if isinstance(source, nn.Module):
        return Source(title=_title(source), model=source, run=Run())
    path, model = Path(source), model_at(Path(source))
    return Source(title=_title(model), model=model, run=_read_folder(path) if path.is_dir() else Run())


def model_at(path: Path) -> nn.Module:
    """The model of a run folder (its best checkpoint), a deploy folder, a checkpoint or a ``.safetensors`` file.

    Raises:
        CheckpointError: There is nothing at the path, it is no such file or folder, or it is damaged.
    """
    path = _model_file(path) if path.is_dir() else path
    if path.suffix != ".ckpt":
        return load(path)
    from repblocks.training.checkpoints.restore import model_from_checkpoint  # Lightning takes seconds to import

    return model_from_checkpoint(path)


def _model_file(folder: Path) -> Path:
    """The best checkpoint of a run, or what is left of the run without its checkpoints."""
    for name in ("checkpoints/best.ckpt", "model.safetensors", "deploy/model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder} holds no model: needed is the folder of a run of train.py, with checkpoints/best.ckpt, or a deploy "
        "folder, with deploy.json and model.safetensors"
    )


def _read_folder(folder: Path) -> Run:
    return Run(manifest=_manifest(folder)) if (folder / manifest.NAME).is_file() else _read_run(folder)


def _read_run(folder: Path) -> Run:
    return Run(
        config=_yaml(folder / "run.yaml"),
        summary=_summary(folder / "summary.json"),
        metrics=_columns(folder / "metrics.csv"),
        manifest=_manifest(folder / "deploy"),
    )


def _manifest(folder: Path) -> dict[str, Any]:
    return manifest.read(folder) if (folder / manifest.NAME).is_file() else {}


def _summary(path: Path) -> dict[str, Any]:
    """What a run wrote at its end, if it has what the page shows."""
    content = _json(path)
    wrong = [f"{key} is {content.get(key)!r:.60}" for key, has in _HAS.items() if content and not has(content.get(key))]
    if wrong:
        raise CheckpointError(_damaged(path, ", ".join(wrong)))
    return content


def _is_form(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(cast("dict[str, Any]", value).get("test_accuracy"), float | int)


def _is_comparison(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(cast("dict[str, Any]", value).get("relative_error"), float | int)


def _is_of_plain_values(value: Any) -> bool:
    return value is None or isinstance(value, dict)


_HAS: Mapping[str, Callable[[Any], bool]] = {
    "train": _is_form,
    "deploy": _is_form,
    "equivalence": _is_comparison,
    "images": _is_of_plain_values,
    "checkpoint": _is_of_plain_values,
    "seconds": _is_of_plain_values,
    "versions": _is_of_plain_values,
}
"""What the page needs of ``summary.json``."""


def _json(path: Path) -> dict[str, Any]:
    try:
        content: object = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(_damaged(path, error)) from error
    return _mapping(path, content)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(_damaged(path, error)) from error
    return _mapping(path, content)


def _mapping(path: Path, content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise CheckpointError(_damaged(path, f"it holds {content!r:.60}, not names and values"))
    return cast("dict[str, Any]", content)


def _columns(path: Path) -> dict[str, list[float | None]]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return {name: [float(row[name]) if row[name] else None for row in rows] for name in rows[0]} if rows else {}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(_damaged(path, error)) from error


def _damaged(path: Path, why: object) -> str:
    return f"{path} is damaged ({why}); take it from a backup, or remove it: the report then goes without it"


def _title(model: nn.Module) -> str:
    facts = vars(model)
    architecture = (facts.get("pretrained_cfg") or {}).get("architecture")
    return str(facts.get("model_name") or architecture or type(model).__name__)
