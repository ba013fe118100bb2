"""When a run writes checkpoints, what stands in them beside Lightning's own, and which of them stay."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from repblocks.files import replacing
from repblocks.training.checkpoints.files import steps_written
from repblocks.training.checkpoints.geometry import Geometry, geometry_of, on_other_processes
from repblocks.training.checkpoints.rank_state import (
    from_all,
    metric_states,
    random_state,
    set_metric_states,
    set_random_state,
    summed,
)
from repblocks.training.checkpoints.signals import StopRequest
from repblocks.training.data import ImageData
from repblocks.training.metrics_file import MetricsFile
from repblocks.training.task import ClassificationTask

PROCESSES, GEOMETRY, ROWS = "processes", "geometry", "metrics"
"""Keys of a checkpoint: the state of each process, how the job was divided, and the rows of ``metrics.csv``."""

VALIDATION = "epoch_loop.val_loop.batch_progress"
UNVALIDATED = {"ready": 1, "completed": 0, "started": 1, "processed": 0}
"""Where Lightning's loops count the batches of a validation, and counts that make them run it."""

MONITORED = "val/accuracy"
"""The metric whose highest value makes a checkpoint the best one."""


class RunCheckpoints(Checkpoint):
    """Write checkpoints from which a run goes on as if it had never stopped.

    One is written at the end of every epoch and, if asked for, every so many optimizer steps; on SIGTERM and SIGINT
    one is written after the batch that runs, and the process leaves. Between the accumulated batches of one step, and
    after an epoch's last batch, none is written: the former would lose gradients, the latter the validation.
    ``last.ckpt`` and ``best.ckpt`` are links to the newest one and to the one with the highest validation accuracy;
    of equally good epochs to the latest, whose weights are better trained.

    Args:
        folder: ``checkpoints/`` of the run.
        keep: How many of the newest ones stay; the best one stays as well.
        every_steps: Optimizer steps between those within an epoch; None for none.
    """

    def __init__(self, folder: Path, *, keep: int = 3, every_steps: int | None = None) -> None:
        self.folder, self.keep, self.every_steps = folder, keep, every_steps
        self.stop = StopRequest()
        self.best: Path | None = None
        self.best_score = float("-inf")
        self.last: Path | None = None
        self._validated = self._unvalidated = False
        self._random: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Which checkpoint is the best, for the checkpoint."""
        return {"best": self.best and self.best.name, "best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Which checkpoint was the best."""
        best, self.best_score = state_dict["best"], state_dict["best_score"]
        self.best = self.folder / best if best else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the links of a resumed run right: it may have been killed after a checkpoint and before its links."""
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path).parent == self.folder:
            self.last = Path(trainer.ckpt_path)
            self._tidy(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for signals: Lightning has just put its own handlers there."""
        self.stop.listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for signals, where there was no sanity check; continue the random numbers of a resumed run."""
        self.stop.listen()
        if self._random is not None:
            set_random_state(self._random)
            self._random = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if one is due, or if the run is to stop."""
        stop = self.stop.came(trainer)
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if stop or (self.every_steps and trainer.global_step % self.every_steps == 0):
            self._write(trainer, f"step-{trainer.global_step:08d}.ckpt")
        if stop:
            self.stop.leave()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any, **more: Any
    ) -> None:
        """Stop within a validation if asked to; the resumed run begins with that validation."""
        if not trainer.sanity_checking and self.stop.came(trainer):
            self._write(trainer, f"step-{trainer.global_step:08d}-unvalidated.ckpt")
            self.stop.leave()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the batches of a validation that was broken off from 0."""
        if self._unvalidated and not trainer.sanity_checking:
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()
            self._unvalidated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that this epoch has a validation accuracy."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch's metrics as one row, and write the epoch's checkpoint."""
        name = f"step-{trainer.global_step:08d}.ckpt"
        if self._validated and (score := trainer.callback_metrics[MONITORED].item()) >= self.best_score:
            self.best, self.best_score = self.folder / name, score
        self._validated = False
        log_epoch(trainer)
        self._write(trainer, name)
        if self.stop.came(trainer):
            self.stop.leave()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning leaves out; every process takes part."""
        assert isinstance(pl_module, ClassificationTask)
        state = {"random": random_state(), "metrics": metric_states(pl_module.train_metrics)}
        checkpoint[PROCESSES] = from_all(trainer, state)
        checkpoint[GEOMETRY] = geometry_of(trainer, _data(trainer)).to_dict()
        checkpoint[ROWS] = [dict(row) for table in _tables(trainer) for row in table.rows]
        if trainer.validating:
            _before_validation(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue this process, and fit a checkpoint of another number of processes to this one.

        Raises:
            ConfigurationError: The images per optimizer step were changed by hand.
        """
        assert isinstance(pl_module, ClassificationTask)
        states, rank = checkpoint[PROCESSES], trainer.global_rank
        self._unvalidated = checkpoint["loops"]["fit_loop"][VALIDATION]["total"] == UNVALIDATED
        data = _data(trainer)
        was, now = Geometry(**checkpoint[GEOMETRY]), geometry_of(trainer, data)
        if was != now:
            on_other_processes(checkpoint, was, now, data, pl_module)
        if was.processes == now.processes:
            set_metric_states(pl_module.train_metrics, states[rank]["metrics"])
        elif rank == 0:
            set_metric_states(pl_module.train_metrics, summed([state["metrics"] for state in states]))
        self._random = states[rank]["random"] if rank < len(states) else None
        for table in _tables(trainer):
            table.rows = [dict(row) for row in checkpoint[ROWS]]

    def _write(self, trainer: pl.Trainer, name: str) -> None:
        path = self.folder / name
        if path != self.last:
            trainer.save_checkpoint(path, weights_only=False)
        self.last = path
        self._tidy(trainer)

    def _tidy(self, trainer: pl.Trainer) -> None:
        """Point the links at the newest and the best checkpoint, and remove those that are neither new nor best."""
        if not trainer.is_global_zero:
            return
        for name, path in (("last", self.last), ("best", self.best)):
            if path is not None:
                _link(self.folder / f"{name}.ckpt", path)
        for path in steps_written(self.folder)[: -self.keep]:
            if path not in (self.best, self.last):
                trainer.strategy.remove_checkpoint(path)


def log_epoch(trainer: pl.Trainer) -> None:
    """Give the metrics of the epoch that ends to all loggers, as one row."""
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name != "loss"}
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, trainer.global_step)
        logger.save()


def _data(trainer: pl.Trainer) -> ImageData:
    data = vars(trainer).get("datamodule")
    assert isinstance(data, ImageData)
    return data


def _tables(trainer: pl.Trainer) -> list[MetricsFile]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def _before_validation(loops: dict[str, Any]) -> None:
    """Say in Lightning's terms that an epoch's batches are done and its validation is still to run, all of it."""
    loops[VALIDATION] = {"total": dict(UNVALIDATED), "current": dict.fromkeys(UNVALIDATED, 0), "is_last_batch": False}


def _link(name: Path, target: Path) -> None:
    """Make ``name`` stand for ``target`` beside it, at once; a copy where the file system has no links."""
    temporary = name.with_name(f".{name.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target.name)
    except OSError:
        with replacing(name) as copy:
            copy.write_bytes(target.read_bytes())
    else:
        temporary.replace(name)
