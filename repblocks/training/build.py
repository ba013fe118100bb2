"""The parts of a run from their groups of the configuration."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from rich import get_console
from torch import Tensor, nn

from repblocks.errors import ConfigurationError, DataError
from repblocks.models.registry import carry, create_model
from repblocks.names import known_name
from repblocks.training.console import EpochBar, EpochLines, is_sweep
from repblocks.training.data import ImageData
from repblocks.training.optimization import trained_as
from repblocks.training.shares import BranchShares
from repblocks.training.task import ClassificationTask

Config = Mapping[str, Any]


def make_model(config: Config, data: ImageData) -> nn.Module:
    """Create the model for the data's classes and channels; it carries the data's preprocessing and class names.

    Args:
        config: ``name``, ``pretrained`` and ``args``.
        data: What the model will be trained on.

    Raises:
        ConfigurationError: An unknown model, or arguments that it refuses.
        DataError: ``args`` ask for other classes or channels than the data has.
    """
    args = dict(config["args"])
    needed = {"num_classes": len(data.class_names), "in_chans": data.preprocessing.input_size[0]}
    for key, value in needed.items():
        if args.setdefault(key, value) != value:
            raise DataError(
                f"model.args.{key}={args[key]}, but data={data.config.name} has {value}; "
                "leave it out, it follows the data"
            )
    model = create_model(config["name"], pretrained=config["pretrained"], **args)
    facts = {"num_classes": needed["num_classes"], "label_names": list(data.class_names)}
    return carry(model, {**asdict(data.preprocessing), **facts})


def require_output(model: nn.Module, data: ImageData) -> None:
    """Run one image of zeros through the model, so that a size which it does not take is found before training.

    Raises:
        ConfigurationError: The model fails, or gives something else than logits ``[N, classes]``.
    """
    size, training = data.preprocessing.input_size, model.training
    got = f"{vars(model).get('model_name')} on images of {size[1]}x{size[2]} pixels"
    remedy = "set data.image_size to what the model takes, or +model.args.img_size=[HEIGHT,WIDTH] where it has that"
    try:
        with torch.no_grad():  # not inference_mode: what a model caches must stay usable in training
            logits = model.eval()(torch.zeros(1, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigurationError(f"{got} fails: {error}; {remedy}") from error
    model.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (1, len(data.class_names)):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigurationError(
            f"{got} gives {shape}, needed is one row of {len(data.class_names)} class scores; leave out the model.args "
            "that change its output"
        )


def make_trainer(config: Config, folder: Path) -> pl.Trainer:
    """Create Lightning's trainer, which keeps ``checkpoints/best.ckpt`` and ``last.ckpt`` and writes ``metrics.csv``.

    Args:
        config: The whole configuration; group ``trainer`` holds arguments of ``pytorch_lightning.Trainer``.
        folder: The run folder.

    Raises:
        ConfigurationError: Arguments that Lightning refuses, or hardware that is not there.
    """
    settings = dict(config["trainer"])
    _require_whole_epochs(settings)
    _require_validated_epochs(settings)
    bar = settings.pop("enable_progress_bar") and get_console().is_terminal
    callbacks: list[Callback] = [_checkpoints(folder), EpochLines(), *_shares(config), *([EpochBar()] if bar else [])]
    loggers = make_loggers(config["logger"], folder)
    fixed: dict[str, Any] = {"default_root_dir": folder, "enable_progress_bar": bar, "enable_model_summary": False}
    try:
        trainer = pl.Trainer(**settings, **fixed, callbacks=callbacks, logger=loggers)
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


def _refuse_sweeps_that_relaunch(trainer: pl.Trainer) -> None:
    """Lightning starts its other processes with the same command line: under --multirun each would sweep again."""
    if is_sweep() and trainer.strategy.launcher is not None:
        raise ConfigurationError(
            "--multirun together with processes that Lightning starts would run the whole sweep in each of them; start "
            "the processes with torchrun --nproc-per-node N train.py --multirun ..., or use trainer.devices=1"
        )


class LatestBest(ModelCheckpoint):
    """Of equally good epochs it keeps the last: small validation sets tie often, later weights are better trained."""

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether the epoch that gave ``current`` is to be kept."""
        tied = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        return tied or super().check_monitor_top_k(trainer, current)


def _shares(config: Config) -> list[Callback]:
    wanted = config["branch_shares"]
    if not isinstance(wanted, bool):
        raise ConfigurationError(f"branch_shares={wanted} needs to be true or false")
    return [BranchShares()] if wanted else []


def _checkpoints(folder: Path) -> ModelCheckpoint:
    return LatestBest(
        dirpath=folder / "checkpoints",
        filename="best",
        monitor="val/accuracy",
        mode="max",
        save_last=True,
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )


def make_loggers(config: Config, folder: Path) -> list[Logger]:
    """Create the loggers: ``metrics.csv`` always, TensorBoard's files in ``tensorboard/`` if asked for.

    Raises:
        ConfigurationError: An unknown logger, or TensorBoard without its package.
    """
    name = known_name("logger.name", config["name"], ("csv", "tensorboard"))
    loggers: list[Logger] = [CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)]
    if name == "tensorboard":
        try:
            loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                'logger=tensorboard needs the package tensorboard: pip install "repblocks[tensorboard]"'
            ) from error
    return loggers


def make_task(config: Config, model: nn.Module, data: ImageData, trainer: pl.Trainer) -> ClassificationTask:
    """Create the training task, with a schedule as long as the trainer's run.

    Its model is the one given, or for ``optimizer=repsgd`` the plain network that it amounts to.

    Raises:
        ConfigurationError: A label smoothing that is none, or a model that the optimizer does not train.
        DataError: The training images do not fill one batch.
    """
    assert trainer.max_epochs is not None
    smoothing = config["label_smoothing"]
    if not isinstance(smoothing, int | float) or not 0 <= smoothing <= 1:
        raise ConfigurationError(f"label_smoothing={smoothing} needs to be from 0 to 1; 0.1 is usual, 0 is none")
    trained, multipliers = trained_as(model, config["optimizer"])
    return ClassificationTask(
        trained,
        multipliers=multipliers,
        classes=len(data.class_names),
        optimizer=config["optimizer"],
        scheduler=config["scheduler"],
        epochs=trainer.max_epochs,
        updates_per_epoch=updates_per_epoch(data, trainer),
        label_smoothing=smoothing,
    )


def updates_per_epoch(data: ImageData, trainer: pl.Trainer) -> int:
    """Optimizer steps per epoch, from sizes alone.

    Lightning's ``estimated_stepping_batches`` would build the loaders early, which breaks the exact resume of loaders
    that keep a state.
    """
    batches, limit = data.training_batches(trainer.world_size), trainer.limit_train_batches
    limited = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return max(1, math.ceil(limited / trainer.accumulate_grad_batches))
