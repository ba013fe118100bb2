"""Going on with a run in its folder: its own configuration, and the newest checkpoint that is intact."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from omegaconf import OmegaConf

from repblocks.errors import ConfigurationError
from repblocks.files import remove_unfinished, replacing
from repblocks.names import known_name
from repblocks.training.checkpoints.files import FOLDER, newest_intact

RECORD = "run.yaml"
"""What a run folder says about the run: ``config``, all values, and ``overrides``, those of the command line."""

FREE = (
    "resume",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accumulate_grad_batches",
    "trainer.enable_progress_bar",
    "data.root",
    "data.workers",
    "data.batch_size",
    "data.download",
    "logger",
    "export",
)
"""What may differ when a run goes on: where and on what it runs, not what it computes. (The images per optimizer step
have to stay where ``data.batch_size`` changes; that is checked when the number of processes is known.)"""

_MISSING = object()
"""What differs from every value."""

Config = Mapping[str, Any]


def settled(config: Config, folder: Path) -> Config:
    """The configuration to run with: the given one, or with ``resume=auto`` that of the run in ``folder``.

    What the command line asks for now must be what the run has, except for what is `FREE`; that is taken over.

    Args:
        config: As composed from the command line.
        folder: The run folder.

    Raises:
        ConfigurationError: An unknown ``resume``, one that conflicts with the run, or a run in the folder and no
            ``resume=auto``.
    """
    record = folder / RECORD
    if config["resume"] is None:
        _refuse_to_overwrite(record)
        return config
    known_name("resume", str(config["resume"]), ("auto",))
    if not record.is_file():
        return config
    recorded = yaml.safe_load(record.read_text())
    run: dict[str, Any] = recorded["config"]
    asked = _changed_by(recorded["overrides"], _overrides()) if HydraConfig.initialized() else _differing(run, config)
    _require_no_conflict(run, asked, folder)
    settings = OmegaConf.create(run)
    for key, value in asked.items():
        OmegaConf.update(settings, key, value)
    return {**cast("dict[str, Any]", OmegaConf.to_container(settings)), "resume": config["resume"]}


@rank_zero_only
def _refuse_to_overwrite(record: Path) -> None:
    if record.is_file():
        raise ConfigurationError(
            f"{record.parent} holds a run already; go on with it: python train.py resume=auto "
            f"hydra.run.dir={record.parent}, or choose another folder"
        )


def _overrides() -> list[str]:
    """What the command line changes."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _changed_by(first: Sequence[str], now: Sequence[str]) -> dict[str, Any]:
    """The values that further overrides give, where they differ from what the first ones gave."""
    return _differing(_composed(first), _composed([*first, *now])) if now else {}


def _differing(before: Config, after: Config) -> dict[str, Any]:
    known = dict(_leaves(before))
    return {key: value for key, value in _leaves(after) if known.get(key, _MISSING) != value}


def _composed(overrides: Sequence[str]) -> Mapping[str, Any]:
    values = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _require_no_conflict(run: Config, asked: Mapping[str, Any], folder: Path) -> None:
    has = dict(_leaves(run))
    conflicts = [
        f"{key}={value} (the run has {has.get(key, 'nothing there')})"
        for key, value in asked.items()
        if has.get(key, _MISSING) != value and not _is_free(key)
    ]
    if conflicts:
        raise ConfigurationError(
            f"the run in {folder} has other values than asked for: {'; '.join(conflicts)}; leave them out to go on "
            "with the run as it is, or start another in a folder of its own"
        )


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def checkpoint_to_go_on_from(config: Config, folder: Path) -> Path | None:
    """The newest checkpoint that is intact; None for a run that starts.

    Newer ones that are damaged are reported, and stay where they are until the run writes them again.
    """
    if config["resume"] is None:
        return None
    newest, reasons = newest_intact(folder / FOLDER)
    for reason in reasons:
        rank_zero_warn(f"{reason}; the one before is used")
    return newest


@rank_zero_only
def record(config: Config, folder: Path) -> None:
    """Write what `settled` reads into the folder of a run that starts, and tidy the folder of one that goes on."""
    remove_unfinished(folder / FOLDER)
    if not (folder / RECORD).is_file():
        overrides = [each for each in _overrides() if not each.startswith("resume=")]
        with replacing(folder / RECORD) as temporary:
            temporary.write_text(yaml.safe_dump({"config": dict(config), "overrides": overrides}, sort_keys=False))
