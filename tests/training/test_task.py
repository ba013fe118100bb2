import json
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import nn

from repblocks.errors import NonFiniteError
from repblocks.training.build import make_model, make_task
from repblocks.training.checkpoints.restore import model_from_checkpoint
from repblocks.training.data import DataConfig, ImageData
from repblocks.training.task import ClassificationTask
from repblocks.training.trainer import make_trainer


class Parts:
    """A trainer, a task and data for a tiny run."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        pl.seed_everything(0, verbose=False)
        self.data = ImageData(DataConfig(**config["data"]))
        self.model = make_model(config["model"], self.data)
        self.trainer = make_trainer(config, folder)
        self.task = make_task(config, self.model, self.data, self.trainer)

    def fit(self) -> None:
        self.trainer.fit(self.task, datamodule=self.data)


class Rates(pl.Callback):
    """The learning rate that each optimizer step used."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


class NotANumber(nn.Module):
    """A loss that is NaN from the given call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, *images: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        loss = nn.functional.cross_entropy(logits, labels, reduction="mean" if images else "none")
        return loss if self.left > 0 else loss * math.nan


def fail(task: ClassificationTask, loss: str, calls: int) -> None:
    holder = task.objective if loss == "objective.loss" else task
    setattr(holder, loss.rpartition(".")[2], NotANumber(calls))


def rates_of_a_run(config: dict[str, Any], folder: Path) -> list[float]:
    parts, rates = Parts(config, folder), Rates()
    parts.trainer.callbacks.append(rates)
    parts.fit()
    return rates.seen


SCHEDULE = ("optimizer.lr=1.0", "scheduler.warmup_epochs=0", "scheduler.min_lr=0.0", "trainer.limit_val_batches=1")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_steps_the_schedule_after_every_update(tiny: Any, tmp_path: Path, accumulate: int) -> None:
    counts = ("trainer.max_epochs=2", "trainer.limit_train_batches=4", f"trainer.accumulate_grad_batches={accumulate}")
    seen = rates_of_a_run(tiny(*SCHEDULE, *counts, "scheduler.per=update"), tmp_path)
    updates = 8 // accumulate
    assert seen == pytest.approx([0.5 * (1 + math.cos(math.pi * t / updates)) for t in range(updates)])


def test_lightning_steps_the_schedule_after_every_epoch(tiny: Any, tmp_path: Path) -> None:
    counts = ("trainer.max_epochs=3", "trainer.limit_train_batches=2")
    seen = rates_of_a_run(tiny(*SCHEDULE, *counts, "scheduler.per=epoch"), tmp_path)
    assert seen == pytest.approx([0.5 * (1 + math.cos(math.pi * epoch / 3)) for epoch in (0, 0, 1, 1, 2, 2)])


def test_the_rate_stays_without_a_schedule(tiny: Any, tmp_path: Path) -> None:
    assert rates_of_a_run(tiny("scheduler=none", "optimizer.lr=0.25"), tmp_path) == [0.25, 0.25]


@pytest.mark.parametrize(("stage", "loss", "calls"), [("training", "objective.loss", 4), ("validation", "val_loss", 6)])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoints(
    tiny: Any, tmp_path: Path, stage: str, loss: str, calls: int
) -> None:
    # One validation batch before training and three per epoch: both fail in the second batch of the second epoch.
    parts = Parts(tiny("trainer.max_epochs=3"), tmp_path)
    fail(parts.task, loss, calls)
    with pytest.raises(
        NonFiniteError,
        match=rf"the {stage} loss is nan at epoch 2, batch 2 .*nonfinite-0\.json.*last\.ckpt.*lower optimizer\.lr",
    ):
        parts.fit()
    assert (tmp_path / "metrics.csv").read_text().count("\n") > 1
    for name in ("best.ckpt", "last.ckpt"):
        path = tmp_path / "checkpoints" / name
        assert torch.load(path, weights_only=True)["epoch"] == 0
        assert all(value.isfinite().all() for value in model_from_checkpoint(path).state_dict().values())


def test_a_loss_that_is_not_finite_at_once_says_that_there_is_no_checkpoint(tiny: Any, tmp_path: Path) -> None:
    parts = Parts(tiny(), tmp_path)
    fail(parts.task, "objective.loss", 1)
    with pytest.raises(NonFiniteError, match="none was written yet"):
        parts.fit()


def test_a_step_on_bad_batches_leaves_the_weights_alone(tiny: Any, tmp_path: Path) -> None:
    parts = Parts(tiny(), tmp_path)
    fail(parts.task, "objective.loss", 1)
    before = {name: value.clone() for name, value in parts.model.named_parameters()}
    with pytest.raises(NonFiniteError):
        parts.fit()
    assert all(torch.equal(before[name], value) for name, value in parts.model.named_parameters())


def test_of_equally_good_epochs_the_last_is_kept(tiny: Any, tmp_path: Path) -> None:
    parts = Parts(tiny("trainer.max_epochs=3", "optimizer.lr=0", "scheduler=none"), tmp_path)
    for module in parts.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    parts.fit()
    assert torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 2


def test_label_smoothing_is_for_training_only(tiny: Any, tmp_path: Path) -> None:
    task: ClassificationTask = Parts(tiny("objective.label_smoothing=0.1"), tmp_path).task
    assert (task.objective.config.label_smoothing, task.val_loss.label_smoothing) == (0.1, 0.0)


def test_the_images_of_a_bad_batch_are_saved(tiny: Any, tmp_path: Path) -> None:
    parts, seen = Parts(tiny(), tmp_path), []
    fail(parts.task, "objective.loss", 2)
    parts.trainer.callbacks.append(
        LambdaCallback(on_train_batch_start=lambda trainer, task, batch, _: seen.append(batch[2].tolist()))
    )
    with pytest.raises(NonFiniteError):
        parts.fit()
    saved = json.loads((tmp_path / "nonfinite-0.json").read_text())
    assert saved["indices"] == seen[1]
    assert (saved["stage"], saved["epoch"], saved["batch"], saved["loss"]) == ("training", 1, 2, "nan")


def test_the_same_seed_gives_the_same_weights(tiny: Any, tmp_path: Path) -> None:
    def trained(folder: str) -> dict[str, torch.Tensor]:
        parts = Parts(tiny(), tmp_path / folder)
        parts.fit()
        return parts.model.state_dict()

    first, second = trained("a"), trained("b")
    assert all(torch.equal(first[key], second[key]) for key in first)
