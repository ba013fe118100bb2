"""Lightning's trainer from its groups of the configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from rich import get_console

from repblocks.errors import ConfigurationError
from repblocks.names import known_name
from repblocks.training.averaging import make_averaging
from repblocks.training.build import Config, flag
from repblocks.training.checkpoints.callback import RunCheckpoints
from repblocks.training.checkpoints.files import FOLDER, CheckpointFiles
from repblocks.training.console import EpochBar, EpochLines, is_sweep
from repblocks.training.metrics_file import MetricsFile
from repblocks.training.shares import BranchShares


def make_trainer(config: Config, folder: Path, *, purge_from: int | None = None) -> pl.Trainer:
    """Create Lightning's trainer, which writes ``checkpoints/`` and ``metrics.csv`` as `RunCheckpoints` says.

    Args:
        config: The whole configuration; group ``trainer`` holds arguments of ``pytorch_lightning.Trainer``.
        folder: The run folder.
        purge_from: As for `make_loggers`.

    Raises:
        ConfigurationError: Arguments that Lightning refuses, or hardware that is not there.
    """
    settings = dict(config["trainer"])
    _require_whole_epochs(settings)
    _require_validated_epochs(settings)
    bar = settings.pop("enable_progress_bar") and get_console().is_terminal
    fixed: dict[str, Any] = {
        "default_root_dir": folder,
        "enable_progress_bar": bar,
        "enable_model_summary": False,
        "use_distributed_sampler": False,  # ours divides batches, and does not count padding twice
        "plugins": [*settings.pop("plugins", []), *_plugins()],
        "callbacks": _callbacks(config, folder, bar=bar),
        "logger": make_loggers(config["logger"], folder, purge_from),
    }
    try:
        trainer = pl.Trainer(**settings, **fixed)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the trainer refuses its settings: {error}; change trainer.*, described in configs/trainer/auto.yaml"
        ) from error
    _refuse_sweeps_that_relaunch(trainer)
    return trainer


def _require_whole_epochs(settings: Config) -> None:
    epochs = settings["max_epochs"]
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ConfigurationError(
            f"trainer.max_epochs={epochs} needs to be at least 1 and a whole number: the schedule is as long; "
            "set trainer.max_epochs=1 for a short run"
        )
    for key, off in _CUTS.items():
        if settings.get(key, off[0]) not in off:
            raise ConfigurationError(
                f"trainer.{key}={settings[key]} may end training within an epoch, before the validation that chooses "
                "the exported checkpoint; use trainer.max_epochs=1 and trainer.limit_train_batches=N for a short run"
            )


_CUTS: Mapping[str, tuple[Any, ...]] = {"fast_dev_run": (False, None), "max_steps": (-1, None), "max_time": (None,)}
"""Lightning's other ways to end a run, with their values that do not."""


def _require_validated_epochs(settings: Config) -> None:
    skipped = settings["limit_val_batches"] == 0 or settings["limit_train_batches"] == 0
    if skipped or (settings.get("check_val_every_n_epoch") or 1) > settings["max_epochs"]:
        raise ConfigurationError(
            "validation would never run, but its accuracy chooses the checkpoint that is exported; leave "
            "trainer.limit_train_batches and trainer.limit_val_batches above 0 and trainer.check_val_every_n_epoch at "
            "most trainer.max_epochs"
        )
    if settings.get("val_check_interval") not in (None, 1, 1.0):
        raise ConfigurationError(
            f"trainer.val_check_interval={settings['val_check_interval']} would validate within epochs, but "
            "checkpoints and rows of metrics.csv are per epoch; leave it out"
        )


def _refuse_sweeps_that_relaunch(trainer: pl.Trainer) -> None:
    """Lightning starts its other processes with the same command line: under --multirun each would sweep again."""
    environment = vars(trainer.strategy).get("cluster_environment")
    if is_sweep() and environment is not None and not environment.creates_processes_externally:
        raise ConfigurationError(
            "--multirun together with processes that Lightning starts would run the whole sweep in each of them; start "
            "the processes with torchrun --nproc-per-node N train.py --multirun ..., submit the jobs with "
            "hydra/launcher=slurm, or use trainer.devices=1"
        )


def _plugins() -> list[Any]:
    """Our checkpoint files; and on SLURM no requeueing by Lightning, whose checkpoint would be another than ours."""
    return [CheckpointFiles(), *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [])]


def _callbacks(config: Config, folder: Path, *, bar: bool) -> list[Callback]:
    """In the order that matters: averages are updated before checkpoints hold them."""
    averaging = make_averaging(config["ema"])
    shares = [BranchShares()] if flag(config, "branch_shares") else []
    return [
        *([averaging] if averaging else []),
        EpochLines(),
        *shares,
        *([EpochBar()] if bar else []),
        _checkpoints(config, folder),
    ]


def _checkpoints(config: Config, folder: Path) -> RunCheckpoints:
    keep, every = config["checkpoint"]["keep"], config["checkpoint"]["every_steps"]
    for key, value in (("keep", keep), ("every_steps", 1 if every is None else every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"checkpoint.{key}={value} needs to be a whole number, at least 1")
    return RunCheckpoints(folder / FOLDER, keep=keep, every_steps=every)


def make_loggers(config: Config, folder: Path, purge_from: int | None = None) -> list[Logger]:
    """Create the loggers: ``metrics.csv`` always, TensorBoard's files in ``tensorboard/`` if asked for.

    Args:
        config: Group ``logger``.
        folder: The run folder.
        purge_from: The step from which on TensorBoard is to forget what a run wrote before it was resumed.

    Raises:
        ConfigurationError: An unknown logger, or TensorBoard without its package.
    """
    name = known_name("logger.name", config["name"], ("csv", "tensorboard"))
    loggers: list[Logger] = [MetricsFile(folder / "metrics.csv")]
    if name == "tensorboard":
        try:
            loggers.append(TensorBoardLogger(folder, name="", version="tensorboard", purge_step=purge_from))
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                'logger=tensorboard needs the package tensorboard: pip install "repblocks[tensorboard]"'
            ) from error
    return loggers
