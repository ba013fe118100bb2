"""Our own file: weights, and in its header all that rebuilds the model."""

from pathlib import Path
from typing import Any

from torch import nn

from repblocks.checkpoint import load, save
from repblocks.export.jobs import Job


def write(job: Job, path: Path) -> dict[str, Any]:
    """The deploy form, for ``repblocks.load``."""
    save(job.deploy, path)
    return {"load": f"repblocks.load({'model.safetensors'!r})"}


def open_file(path: Path) -> nn.Module:
    """The model in the file."""
    return load(path)
