"""Models and trainers that stop in the middle of an epoch."""

from io import BytesIO
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


def assert_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Always(nn.Module):
    """Answers the same class for every image."""

    def __init__(self, answer: int, classes: int = 2) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.eye(classes)[answer])

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def through_a_file(state: Any) -> Any:
    """A state as a checkpoint gives it back, which unpickles no code."""
    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def end_workers(loader: Any) -> None:
    """After an error they are garbage in a cycle, and the collector waits five seconds for each."""
    getattr(loader._iterator, "_shutdown_workers", lambda: None)()


def trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


class Recorder(pl.LightningModule):
    """Keeps the batches that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        self.batches.append(batch)
        return self.weight * batch[0].mean()

    def validation_step(self, batch: Any, batch_index: int) -> None:
        assert len(batch) == 3

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Killed(Exception):
    """The end of a run that is not asked to end."""


class KillAfter(pl.Callback):
    """Writes the state at a moment after a number of steps and kills the run."""

    def __init__(self, moment: str, steps: int, path: Path) -> None:
        self.steps, self.path = steps, path
        setattr(self, moment, self.kill)

    def kill(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            end_workers(trainer.train_dataloader)
            raise Killed
