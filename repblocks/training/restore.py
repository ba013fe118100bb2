"""Training checkpoints: the model back from what they say about it."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from repblocks.checkpoint import load_weights
from repblocks.errors import CheckpointError
from repblocks.header import built, carry_description, checked

ENTRY = "repblocks"
"""Key of a Lightning checkpoint under which ``repblocks.checkpoint.describe`` of its model stands."""


def model_from_checkpoint(path: Path) -> nn.Module:
    """Rebuild the model of a training checkpoint in the form that was trained, on the CPU and in eval mode.

    Raises:
        CheckpointError: The file is missing, truncated, foreign or too new, its model is not registered here or asks
            for a download, or its weights do not fit.
    """
    checkpoint = _read(path)
    about, state = checkpoint.get(ENTRY), checkpoint.get("state_dict")
    if about is None or state is None:
        raise CheckpointError(
            f"{path} is not a checkpoint of train.py: it does not say which model it holds; give "
            "RUN/checkpoints/best.ckpt, or a .safetensors file written by rb.save or rb.export"
        )
    about, weights = checked(path, about), _weights(path, state)
    model = built(path, about)
    try:
        load_weights(model, weights, assign=True)
    except CheckpointError as error:
        raise CheckpointError(f"the weights in {path} are not those of {about['model']}: {error}") from error
    return carry_description(model, about).eval()


def _weights(path: Path, state: object) -> dict[str, Tensor]:
    """The model's part of the task's state dict."""
    entries = cast("dict[Any, Any]", state if isinstance(state, dict) else {})
    weights = {str(key)[6:]: value for key, value in entries.items() if str(key).startswith("model.")}
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"the state_dict of {path} is damaged: it is no dict of tensors; use another copy")
    return weights


def _read(path: Path) -> dict[str, Any]:
    """Load plain values and tensors only: pickled code is refused, not run."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path.absolute()}; checkpoints are in RUN/checkpoints/")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(_unreadable(path, "it is no complete archive of torch.save"))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is foreign: it holds objects other than tensors and plain values, which are not loaded because "
            f"they can run code ({str(error).partition(chr(10))[0]})"
        ) from error
    except Exception as error:  # a damaged archive can make an unpickler raise anything
        raise CheckpointError(_unreadable(path, repr(error))) from error
    return cast("dict[str, Any]", checkpoint) if isinstance(checkpoint, dict) else {}


def _unreadable(path: Path, why: str) -> str:
    return (
        f"{path} is truncated or not a checkpoint ({why}); use another, such as checkpoints/last.ckpt of the same run, "
        "or a .safetensors file written by rb.save or rb.export"
    )
