"""What a run says on the terminal: a line per epoch, a table at the end, errors in one block."""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from pytorch_lightning.callbacks import RichProgressBar
from rich import get_console
from rich.console import Console
from rich.table import Table

from repblocks.errors import RepblocksError
from repblocks.terminal import show_error
from repblocks.training.checkpoints.files import FOLDER, last_checkpoint
from repblocks.training.summary import Summary
from repblocks.training.task import ClassificationTask

_CHATTER = (
    "Tip: For seamless cloud",  # advertisements for litlogger and litmodels
    "GPU available: ",  # the first line of a run names the device that is used
    "TPU available: ",
    "HPU available: ",
    "`Trainer.fit` stopped: `max_epochs=",  # the epoch lines end there
    "Restoring states from the checkpoint path",  # a resumed run names its checkpoint
    "Restored all states from the checkpoint",
)


def quiet_lightning() -> None:
    """Drop the messages of Lightning that say nothing to our users, each for a reason; all others stay."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_not_chatter)
    # Images that are in memory or small are read faster without worker processes; data.workers says how many.
    warnings.filterwarnings("ignore", r"The '\w+_dataloader' does not have many workers")
    # Lightning 2.6 asks torch 2.11 and newer about pytrees in a way that those announce to change.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")


def _is_not_chatter(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(chatter in message for chatter in _CHATTER)


@contextmanager
def readable_errors() -> Generator[None]:
    """Show errors that repblocks raises on purpose as one block and exit with code 1.

    In a sweep the error goes on to Hydra, which runs the other jobs before it ends with that error.
    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """
    try:
        yield
    except RepblocksError as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        show_error(error, _said(error))
        if is_sweep():
            raise
        sys.exit(1)


def is_sweep() -> bool:
    """Whether this is a job of ``--multirun``."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def _said(error: RepblocksError) -> str:
    """The message; of an error in a DataLoader's worker process without the traceback that torch puts around it."""
    return str(error).rpartition(f"repblocks.errors.{type(error).__name__}: ")[2].strip()


@contextmanager
def stoppable(folder: Path) -> Generator[None]:
    """Where a signal ends the run in ``folder``, say what is left of it and how it goes on."""
    try:
        yield
    except SystemExit as stop:
        if stop.code in STOPPED:
            written = last_checkpoint(folder / FOLDER)
            resumed = f"go on with: python train.py resume=auto hydra.run.dir={shortest(folder)}"
            Console(stderr=True).print(
                f"{STOPPED[stop.code]}; {resumed if written else 'no checkpoint was written yet'}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        raise


STOPPED = {128 + signal.SIGINT: "interrupted", 128 + signal.SIGTERM: "terminated"}
"""Exit codes of a process that a signal stopped, and what is said then."""


class EpochBar(RichProgressBar):
    """Lightning's progress bar, counting epochs from 1 as the epoch lines do."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"


class EpochLines(pl.Callback):
    """Print one line per epoch, in terminals and log files alike."""

    def __init__(self) -> None:
        self.started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of an epoch that a resumed run is in."""
        self.started = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch's metrics, and print them on the first process."""
        assert isinstance(pl_module, ClassificationTask)
        pl_module.log_train_metrics()
        # Reading a metric averages it over all processes, so each has to read.
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not trainer.is_global_zero:
            return
        validated = f"  val {metrics['val/accuracy']:6.2%}" if "val/accuracy" in metrics else ""
        get_console().print(
            f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}"
            f"  loss {metrics['train/loss']:.4f}  train {metrics['train/accuracy']:6.2%}{validated}"
            f"  lr {metrics['lr']:.2e}  {time.perf_counter() - self.started:.1f} s",
            highlight=False,
        )


def summary_table(summary: Summary) -> Table:
    """Both forms side by side, how far apart their outputs are, and where the files are."""
    forms = list(summary.forms.items())
    table = Table(title=f"{summary.model} on {summary.data}", title_justify="left")
    table.add_column()
    for name, _ in forms:
        table.add_column(f"{name} form", justify="right")
    table.add_row("test accuracy", *(f"{form.test_accuracy:.2%}" for _, form in forms))
    table.add_row("parameters", *(f"{form.params:,}" for _, form in forms))
    table.add_row("MACs per image", *(f"{form.macs / 1e6:,.2f} M" for _, form in forms))
    table.add_row("latency, 1 image, 1 thread", *(f"{form.latency_ms:.2f} ms" for _, form in forms))
    if summary.equivalence is not None:
        report = summary.equivalence
        table.add_row("largest output difference", "", f"{report.max_abs_error:.2g}")
        table.add_row("  relative (at most)", "", f"{report.relative_error:.2g} ({report.tolerance:.0e})")
    return table


def written_files(folder: Path) -> str:
    """The files of a run, one per line."""
    names = ("deploy/*", f"{FOLDER}/best.ckpt", f"{FOLDER}/last.ckpt", "metrics.csv", "summary.json")
    found = [path for name in names for path in sorted(folder.glob(name))]
    return "\n".join(["written:", *(f"  {shortest(path)}" for path in found)])


def shortest(path: Path) -> Path:
    """Relative to the working directory where it is inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
