"""Training with PyTorch Lightning; the only part of the package that needs it."""

from repblocks.training.checkpoints.restore import model_from_checkpoint
from repblocks.training.console import readable_errors
from repblocks.training.data import DataConfig, ImageData
from repblocks.training.pipeline import run
from repblocks.training.task import ClassificationTask

__all__ = ["ClassificationTask", "DataConfig", "ImageData", "model_from_checkpoint", "readable_errors", "run"]
