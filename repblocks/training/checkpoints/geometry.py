"""How a job divides its images over processes and batches, and a checkpoint of one division in another."""

from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl

from repblocks.errors import ConfigurationError
from repblocks.training.data import ImageData
from repblocks.training.task import ClassificationTask


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a position within an epoch is counted in.

    Attributes:
        processes: Of the job.
        batch_size: Images per process and batch.
        accumulate: Batches per optimizer step.
        workers: Per process, that read images.
    """

    processes: int
    batch_size: int
    accumulate: int
    workers: int

    @property
    def images_per_batch(self) -> int:
        """Of all processes."""
        return self.processes * self.batch_size

    @property
    def images_per_step(self) -> int:
        """Of all processes, from one optimizer step to the next."""
        return self.images_per_batch * self.accumulate

    def to_dict(self) -> dict[str, int]:
        """Plain values, for a checkpoint."""
        return asdict(self)


def geometry_of(trainer: pl.Trainer, data: ImageData) -> Geometry:
    """The division of the job that runs."""
    return Geometry(
        processes=trainer.world_size,
        batch_size=data.config.batch_size,
        accumulate=trainer.accumulate_grad_batches,
        workers=data.config.workers,
    )


def on_other_processes(
    checkpoint: dict[str, Any], was: Geometry, now: Geometry, data: ImageData, task: ClassificationTask
) -> None:
    """Change a checkpoint so that a job of another division goes on at the same image with the rate due there.

    The place within the epoch is rounded down to a whole optimizer step, and the learning rate follows the images per
    step as ``optimizer.lr_base_size`` says.

    Raises:
        ConfigurationError: ``data.batch_size`` or ``trainer.accumulate_grad_batches`` changed so that the images per
            step did.
    """
    by_hand = (was.batch_size, was.accumulate) != (now.batch_size, now.accumulate)
    if by_hand and was.images_per_step != now.images_per_step:
        raise ConfigurationError(
            f"the run had {was.images_per_step} images per optimizer step ({was}), and would go on with "
            f"{now.images_per_step} ({now}); choose data.batch_size and trainer.accumulate_grad_batches so that their "
            "product with the number of processes stays, or leave both as they were"
        )
    _move(checkpoint["loops"]["fit_loop"], was, now, data, task.batches_per_epoch)
    factor = task.peak_rate(now.images_per_step) / task.peak_rate(was.images_per_step)
    for optimizer in checkpoint["optimizer_states"]:
        for group in optimizer["param_groups"]:
            group["lr"] = group["lr"] * factor
    # Schedules are functions of the clock; those just built know the new length of an epoch and the new peak.
    checkpoint["lr_schedulers"] = []


def _move(loops: dict[str, Any], was: Geometry, now: Geometry, data: ImageData, batches_per_epoch: int) -> None:
    """Put Lightning's counters and the data at the same image of the epoch."""
    loops["state_dict"].pop("combined_loader", None)
    progress = loops["epoch_loop.batch_progress"]
    count = progress["current"]
    open_batches = count["processed"] - count["completed"]
    done = count["processed"] * was.images_per_batch // now.images_per_step * now.accumulate
    batches = batches_per_epoch if progress["is_last_batch"] else done
    count.update(ready=batches, started=batches, processed=batches, completed=batches - open_batches)
    data.start_at(batches * now.images_per_batch if _is_within_an_epoch(loops) else 0)


def _is_within_an_epoch(loops: dict[str, Any]) -> bool:
    epochs = loops["epoch_progress"]["current"]
    return epochs["processed"] < epochs["ready"]
