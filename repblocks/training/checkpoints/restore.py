"""Training checkpoints: the model back from what they say about it."""

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from repblocks.checkpoint import load_weights
from repblocks.errors import CheckpointError
from repblocks.header import built, carry_description, checked
from repblocks.training.checkpoints.files import read_checkpoint

ENTRY = "repblocks"
"""Key of a Lightning checkpoint under which ``repblocks.header.describe`` of its model stands."""


def model_from_checkpoint(path: Path) -> nn.Module:
    """Rebuild the model of a training checkpoint in the form that was trained, on the CPU and in eval mode.

    Raises:
        CheckpointError: The file is missing, truncated, foreign or too new, its model is not registered here or asks
            for a download, or its weights do not fit.
    """
    checkpoint = read_checkpoint(path)
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
