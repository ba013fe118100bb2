"""Image classification as a Lightning module."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from repblocks.errors import ConfigurationError, NonFiniteError
from repblocks.header import describe
from repblocks.optim import Multipliers, RepOptimizer
from repblocks.training.optimization import interval, make_optimizer, make_scheduler
from repblocks.training.restore import ENTRY

Batch = tuple[Tensor, Tensor]


class ClassificationTask(pl.LightningModule):
    """Cross-entropy on images, with accuracy in training and validation.

    Args:
        model: Images ``[N, C, H, W]`` to logits ``[N, classes]``; made by ``create_model``.
        classes: Number of classes.
        optimizer: See ``make_optimizer``.
        scheduler: See ``make_scheduler``.
        epochs: Length of the schedule.
        updates_per_epoch: Optimizer steps per epoch.
        label_smoothing: Of the training loss.
        multipliers: Of the optimizer ``repsgd``, as ``trained_as`` gives them with the model.

    Raises:
        ConfigurationError: In training, where gradients are to be clipped for ``repsgd``.
        NonFiniteError: In training or validation, before the weights are touched or a checkpoint is written.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        epochs: int,
        updates_per_epoch: int,
        label_smoothing: float = 0.0,
        multipliers: Multipliers | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer, self.scheduler, self.multipliers = optimizer, scheduler, multipliers
        self.epochs, self.updates_per_epoch = epochs, updates_per_epoch
        self.train_loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.val_loss = nn.CrossEntropyLoss()
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss of one batch."""
        images, labels = batch
        logits = self(images)
        loss = self.train_loss(logits, labels)
        self._require_finite(loss, "training", batch_index)
        self.train_accuracy(logits, labels)
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss and accuracy of one batch."""
        images, labels = batch
        logits = self(images)
        loss = self.val_loss(logits, labels)
        self._require_finite(loss, "validation", batch_index)
        self.val_accuracy(logits, labels)
        self.log("val/loss", loss, sync_dist=True)
        self.log("val/accuracy", self.val_accuracy)

    def on_train_epoch_start(self) -> None:
        """Log the learning rate that the epoch starts with."""
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule if there is one."""
        optimizer = make_optimizer(self.model, self.optimizer, self.multipliers)
        scheduler = make_scheduler(
            optimizer, self.scheduler, epochs=self.epochs, updates_per_epoch=self.updates_per_epoch
        )
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval(scheduler)},
        }

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
        """Schedules of timm are functions of the clock: tell them which epoch or update comes next."""
        assert isinstance(scheduler, Scheduler)
        scheduler.step(self.current_epoch + 1)
        scheduler.step_update(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how to rebuild the model, in plain values that load without pickled code."""
        checkpoint[ENTRY] = describe(self.model)

    def _require_finite(self, loss: Tensor, stage: str, batch_index: int) -> None:
        if torch.isfinite(loss):
            return
        callback = self.trainer.checkpoint_callback
        kept = callback.last_model_path if isinstance(callback, ModelCheckpoint) else ""
        raise NonFiniteError(
            f"the {stage} loss is {loss.item()} at epoch {self.current_epoch + 1}, batch {batch_index + 1} "
            f"(optimizer step {self.global_step + 1}); "
            f"last good checkpoint: {kept or 'none was written yet'}; "
            "lower optimizer.lr, set trainer.gradient_clip_val=1.0, or use trainer.precision=32-true"
        )
