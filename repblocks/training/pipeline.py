"""A training run, from configuration to verified deploy files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich import get_console
from torch import nn

from repblocks.blocks.base import deployed, form_of
from repblocks.blocks.execution import set_execution
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.expansion.contract import contracted
from repblocks.expansion.recipe import recipe_of
from repblocks.expansion.report import ExpansionReport
from repblocks.export import USUAL_FORMATS, check_formats, export, installed_formats
from repblocks.training.build import Config, make_model, make_task, require_output
from repblocks.training.checkpoints.callback import RunCheckpoints
from repblocks.training.checkpoints.files import FOLDER, step_of
from repblocks.training.checkpoints.restore import model_from_checkpoint
from repblocks.training.checkpoints.resume import checkpoint_to_go_on_from, record, settled
from repblocks.training.console import quiet_lightning, shortest, stoppable, summary_table, written_files
from repblocks.training.data import DataConfig, ImageData
from repblocks.training.expansion import expanded, remarks_on
from repblocks.training.reestimation import reestimate
from repblocks.training.summary import Stopwatch, Summary, measure, versions
from repblocks.training.trainer import make_trainer
from repblocks.verification import verify

VERIFIED_IMAGES = 64
"""Test images on which the two forms are compared."""


def run(config: Config, folder: Path) -> Summary | None:
    """Train, collapse, verify, export; every file lands in ``folder``.

    Args:
        config: The composed configuration (``configs/``) as plain values; with ``resume=auto`` the run in the folder
            goes on, if there is one.
        folder: The run folder.

    Returns:
        What came out; None on the processes of a distributed run that are not the first.

    Raises:
        RepblocksError: Whatever stops the run on purpose; checkpoints written until then stay.
    """
    quiet_lightning()
    config = settled(config, folder)
    check_formats(chosen_formats(config))
    pl.seed_everything(checked_seed(config["seed"]), workers=True, verbose=False)
    clock, checkpoint = Stopwatch(), checkpoint_to_go_on_from(config, folder)
    trainer = make_trainer(config, folder, purge_from=checkpoint and step_of(checkpoint) + 1)
    with clock("data"):
        data = ImageData(DataConfig.of(config["data"]), seed=config["seed"], epochs=config["trainer"]["max_epochs"])
    model, expansion = expanded(make_model(config["model"], data), config["model"]["expand"])
    set_execution(model, config["model"]["execution"])
    require_output(model, data)
    task = make_task(config, model, data, trainer)
    record(config, folder)
    announce(config, data, trainer, folder, remarks(config, model, expansion, checkpoint))
    with stoppable(folder):
        with clock("fit"):
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
        return conclude(config, data, trainer, folder, clock) if trainer.is_global_zero else None


def checked_seed(seed: Any) -> int:
    """The seed, if random number generators take it.

    Raises:
        ConfigurationError: They do not.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigurationError(f"seed={seed} needs to be a whole number from 0 to 2**32 - 1, such as seed=0")
    return seed


def chosen_formats(config: Config) -> list[str]:
    """The formats to export: as configured, or the usual ones as far as they are installed."""
    formats = config["export"]["formats"]
    return [name for name in USUAL_FORMATS if name in installed_formats()] if formats is None else formats


def remarks(
    config: Config, model: nn.Module, expansion: ExpansionReport | None, checkpoint: Path | None = None
) -> list[str]:
    """What users should know before they wait: what is resumed and expanded, nothing to collapse, missing packages."""
    found = [] if checkpoint is None else [f"going on from {shortest(checkpoint)}"]
    found += [] if expansion is None else remarks_on(expansion)
    found += [] if form_of(model) == "train" else ["no block of this model collapses, so both its forms are the same"]
    if config["export"]["formats"] is None:
        left_out = set(USUAL_FORMATS) - set(installed_formats())
        found += [f"{name} is not exported: pip install 'repblocks[export]'" for name in sorted(left_out)]
    return found


def announce(config: Config, data: ImageData, trainer: pl.Trainer, folder: Path, notes: Iterable[str]) -> None:
    """Say what is about to be trained, on the first process."""
    if trainer.is_global_zero:
        images = ", ".join(f"{count:,} {part}" for part, count in data.splits.sizes().items())
        device = trainer.strategy.root_device.type
        devices = f"{trainer.world_size} {device} processes" if trainer.world_size > 1 else device
        get_console().print(
            f"{config['model']['name']} on {data.config.name} ({images} images) on {devices}",
            f"run folder: {shortest(folder)}",
            *notes,
            sep="\n",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def conclude(config: Config, data: ImageData, trainer: pl.Trainer, folder: Path, clock: Stopwatch) -> Summary:
    """Contract, collapse, verify, measure and export the best checkpoint, and write ``summary.json``.

    Raises:
        CheckpointError: Training wrote no checkpoint.
        VerificationError: The forms differ on test images; nothing is exported.
    """
    best, val_accuracy = best_checkpoint(trainer)
    train_form = model_from_checkpoint(best).float()  # runtimes want float32, also of what was trained in float64
    if config["reestimate_bn"]:
        with clock("re-estimate BatchNorm"):
            reestimate(train_form, data.augmented_images(), config["reestimate_bn"])
    images = data.test_images(VERIFIED_IMAGES)
    with clock("collapse and verify"):
        plain = contracted(train_form)
        deploy_form = deployed(plain)
        report = verify(train_form, deploy_form, images)
        report.raise_if_different("the deploy form")
    with clock("test"):
        forms = measure({"train": train_form, "deploy": deploy_form}, data, trainer.strategy.root_device)
    with clock("export"):
        export(plain, folder / "deploy", formats=chosen_formats(config), inputs=images, source=best)
    details = {
        "expansions": list(recipe_of(train_form)),
        "classes": len(data.class_names),
        "images": data.splits.sizes(),
        "seed": config["seed"],
        "epochs": trainer.current_epoch,
        "checkpoint": {"file": f"{FOLDER}/{best.name}", "val_accuracy": val_accuracy},
        "seconds": clock.seconds,
        "versions": versions(),
    }
    summary = Summary(
        model=config["model"]["name"], data=data.config.name, forms=forms, equivalence=report, details=details
    )
    summary.write(folder / "summary.json")
    get_console().print(summary_table(summary))
    get_console().print(written_files(folder), highlight=False, markup=False, soft_wrap=True)
    return summary


def best_checkpoint(trainer: pl.Trainer) -> tuple[Path, float]:
    """The checkpoint with the best validation accuracy, and that accuracy.

    Raises:
        CheckpointError: There is none.
    """
    callback = trainer.checkpoint_callback
    if not isinstance(callback, RunCheckpoints) or callback.best is None:
        raise CheckpointError(
            "training ended without a validation, so there is no checkpoint to collapse and export; let it run for "
            "a whole epoch: take out the trainer.* arguments that end or skip one"
        )
    return callback.best, callback.best_score
