"""Image classification as a Lightning module."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from repblocks.blocks.base import deployed
from repblocks.errors import ConfigurationError, NonFiniteError
from repblocks.header import describe
from repblocks.optim import Multipliers, RepOptimizer
from repblocks.training.checkpoints.files import FOLDER, last_checkpoint
from repblocks.training.checkpoints.restore import ENTRY
from repblocks.training.data.batches import IGNORED, Batch
from repblocks.training.decay import decay_loss
from repblocks.training.objective import Objective
from repblocks.training.optimization import interval, make_optimizer, make_scheduler, scaled_lr


class ClassificationTask(pl.LightningModule):
    """The objective on images, with accuracy in training and validation.

    Args:
        model: Images ``[N, C, H, W]`` to logits ``[N, classes]``; made by ``create_model``.
        classes: Number of classes.
        objective: What is minimised.
        optimizer: See ``make_optimizer``.
        scheduler: See ``make_scheduler``.
        epochs: Length of the schedule.
        batches_per_epoch: Of each process.
        accumulate: Batches per optimizer step.
        images_per_step: Of all processes, for the learning rate.
        multipliers: Of the optimizer ``repsgd``, as ``trained_as`` gives them with the model.
        validate_deployed: Collapse a copy for each validation, and log its accuracy as ``val/deploy_accuracy``.

    Raises:
        ConfigurationError: In training, where gradients are to be clipped for ``repsgd``.
        NonFiniteError: In training or validation, before the weights are touched or a checkpoint is written.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        objective: Objective,
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        epochs: int,
        batches_per_epoch: int,
        accumulate: int = 1,
        images_per_step: int = 1,
        multipliers: Multipliers | None = None,
        validate_deployed: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.optimizer, self.scheduler, self.multipliers = optimizer, scheduler, multipliers
        self.epochs, self.batches_per_epoch = epochs, batches_per_epoch
        self.accumulate, self.images_per_step = accumulate, images_per_step
        self.val_loss = nn.CrossEntropyLoss(ignore_index=IGNORED, reduction="none")
        self.train_metrics = _metrics({"train/loss": MeanMetric(), "train/accuracy": _accuracy(classes)})
        self.val_metrics = _metrics({"val/loss": MeanMetric(), "val/accuracy": _accuracy(classes)})
        self.validate_deployed, self.rate = validate_deployed, 0.0
        self._copies: tuple[nn.Module, ...] = ()
        if validate_deployed:
            self.val_metrics.add_metrics({"val/deploy_accuracy": _accuracy(classes)})

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss of one batch."""
        images, labels, indices = batch
        mixed, targets = self.objective.mix(images, labels, self.current_epoch)
        logits = self(mixed)
        loss = self.objective.loss(logits, targets, mixed) + decay_loss(self.model, self.optimizer)
        self._require_finite(loss, indices, "training", batch_index)
        self.train_metrics["train/loss"].update(loss.detach(), weight=len(labels))
        self.train_metrics["train/accuracy"].update(logits, labels)
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def log_train_metrics(self) -> None:
        """Log what the epoch's batches came to, over all processes, and start anew."""
        self._log_and_reset(self.train_metrics)
        self.log("lr", self.rate, sync_dist=True, logger=False)

    def on_validation_epoch_start(self) -> None:
        """Collapse a copy of the weights as they are validated: the live model is never touched."""
        # In a tuple it is no part of this module, nor of its checkpoints.
        self._copies = (deployed(self.model),) if self.validate_deployed else ()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss and accuracy of one batch."""
        images, labels, indices = batch
        logits = self(images)
        losses = self.val_loss(logits, labels)[labels != IGNORED]
        self._require_finite(losses.sum(), indices, "validation", batch_index)
        self.val_metrics["val/loss"].update(losses)
        self.val_metrics["val/accuracy"].update(logits, labels)
        for copy in self._copies:
            self.val_metrics["val/deploy_accuracy"].update(copy(images), labels)

    def on_validation_epoch_end(self) -> None:
        """Log what the validation came to, over all processes."""
        self._log_and_reset(self.val_metrics)
        self._copies = ()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Note the learning rate that the epoch starts with."""
        if batch_idx == 0:
            self.rate = self.trainer.optimizers[0].param_groups[0]["lr"]

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule if there is one."""
        optimizer = make_optimizer(self.model, self.optimizer, self.multipliers, images_per_step=self.images_per_step)
        scheduler = make_scheduler(
            optimizer, self.scheduler, epochs=self.epochs, updates_per_epoch=self.updates_per_epoch
        )
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval(scheduler)},
        }

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps; the last one of an epoch may be over fewer batches."""
        return max(1, math.ceil(self.batches_per_epoch / self.accumulate))

    def peak_rate(self, images_per_step: int) -> float:
        """The learning rate that schedules start from with so many images per optimizer step."""
        return scaled_lr(self.optimizer, images_per_step) or 0.0

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as configured, but never gradients that are still to be multiplied."""
        if gradient_clip_val and isinstance(optimizer, RepOptimizer):
            raise ConfigurationError(
                f"trainer.gradient_clip_val={gradient_clip_val} would clip by a norm of gradients without the "
                "multipliers of optimizer=repsgd, which is another training; set trainer.gradient_clip_val=null, and "
                "lower optimizer.lr where training is unstable"
            )
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Schedules of timm are functions of the clock: tell them which epoch or update comes next.

        Updates are counted from the epoch, so that the clock is right when another number of processes goes on.
        """
        assert isinstance(scheduler, Scheduler)
        scheduler.step(self.current_epoch + 1)
        updates = math.ceil((self.trainer.fit_loop.batch_idx + 1) / self.accumulate)
        scheduler.step_update(self.current_epoch * self.updates_per_epoch + updates)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how to rebuild the model, in plain values that load without pickled code."""
        checkpoint[ENTRY] = describe(self.model)
        checkpoint[RATE] = self.rate

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on within an epoch."""
        self.rate = checkpoint[RATE]

    def _log_and_reset(self, metrics: MetricCollection) -> None:
        self.log_dict(metrics.compute(), sync_dist=True, logger=False)
        metrics.reset()

    def _require_finite(self, loss: Tensor, indices: Tensor, stage: str, batch_index: int) -> None:
        if torch.isfinite(loss):
            return
        folder = Path(self.trainer.default_root_dir)
        where = {
            "stage": stage,
            "epoch": self.current_epoch + 1,
            "batch": batch_index + 1,
            "step": self.global_step + 1,
        }
        saved = folder / f"nonfinite-{self.global_rank}.json"
        saved.write_text(json.dumps({**where, "loss": str(loss.item()), "indices": indices.tolist()}) + "\n")
        raise NonFiniteError(
            f"the {stage} loss is {loss.item()} at epoch {where['epoch']}, batch {where['batch']} (optimizer step "
            f"{where['step']}); the indices of its images are in {saved}; last good checkpoint: "
            f"{last_checkpoint(folder / FOLDER) or 'none was written yet'}; lower optimizer.lr, use "
            f"trainer.precision=32-true{'' if self.multipliers else ', or set trainer.gradient_clip_val=1.0'}"
        )


RATE = "learning_rate"
"""Key of a checkpoint: the rate that its epoch started with."""


def _metrics(metrics: dict[str, Any]) -> MetricCollection:
    """Each with sums of its own, and an update of its own."""
    return MetricCollection(metrics, compute_groups=False)


def _accuracy(classes: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED)
