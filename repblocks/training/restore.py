"""Training checkpoints: the model back from what they say about it."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from repblocks.checkpoint import load_weights
from repblocks.errors import CheckpointError
from repblocks.models.registry import create_model

ENTRY = "repblocks"
"""Key of a Lightning checkpoint under which ``repblocks.checkpoint.describe`` of its model stands."""


def carry(model: nn.Module, facts: Mapping[str, Any]) -> nn.Module:
    """Put facts about the data (timm's names: ``mean``, ``label_names``, ...) where saving and export find them."""
    carrier = cast("Any", model)
    carrier.pretrained_cfg = carrier.default_cfg = {**carrier.pretrained_cfg, **facts}
    return model


def model_from_checkpoint(path: Path) -> nn.Module:
    """Rebuild the model of a training checkpoint in train form, on the CPU and in eval mode.

    Raises:
        CheckpointError: The file is missing, truncated, foreign, or does not fit the model that it names.
    """
    checkpoint = _read(path)
    about, state = checkpoint.get(ENTRY), checkpoint.get("state_dict")
    if about is None or state is None:
        raise CheckpointError(
            f"{path} is not a checkpoint of train.py: it does not say which model it holds; give "
            "RUN/checkpoints/best.ckpt, or a .safetensors file written by rb.save or rb.export"
        )
    model = create_model(about["model"], **about["args"])
    try:
        load_weights(model, {key[6:]: value for key, value in state.items() if key.startswith("model.")})
    except CheckpointError as error:
        raise CheckpointError(f"the weights in {path} are not those of {about['model']}: {error}") from error
    return carry(model, {**about["preprocessing"], "label_names": about["classes"]}).eval()


def _read(path: Path) -> dict[str, Any]:
    """Load plain values and tensors only: pickled code is refused, not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on unusual pickles; the error says what is wrong
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path.absolute()}; checkpoints are in RUN/checkpoints/") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is foreign: it holds objects other than tensors and plain values, which are not loaded because "
            f"they can run code ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint ({_first_line(error)}); use another, such as "
            "checkpoints/last.ckpt of the same run"
        ) from error
    return cast("dict[str, Any]", checkpoint) if isinstance(checkpoint, dict) else {}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
