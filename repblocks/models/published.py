"""Weights that timm publishes, loaded into our models through timm's own hub code."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, resolve_pretrained_cfg
from torch import Tensor, nn

from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.foreign import ours_from_theirs
from repblocks.models.staged import StagedNet

_SHARED = ("hf_hub_id", "license", "input_size", "pool_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")


def published_weights(name: str) -> dict[str, dict[str, Any]]:
    """What timm says of its weights for the counterpart of one of our names, by tag, its default first."""
    theirs = name.removeprefix("rb_")
    if not timm.is_model(theirs):
        return {}
    default = timm.get_pretrained_cfg(theirs)
    tagged = [timm.get_pretrained_cfg(full) for full in timm.list_pretrained(f"{theirs}.*")]
    found = sorted(
        (cfg for cfg in tagged if cfg is not None), key=lambda cfg: default is None or cfg.tag != default.tag
    )
    return {str(cfg.tag): {key: value for key, value in asdict(cfg).items() if key in _SHARED} for cfg in found}


def build_pretrained(build: Callable[..., nn.Module], name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a model and load its published weights.

    They are read from `place_of` if they lie there, and fetched by timm otherwise.

    Args:
        build: ``build_model_with_cfg`` of the model.
        name: Our name of it.
        kwargs: timm's arguments, of which ``pretrained_cfg`` and ``pretrained_cfg_overlay`` choose the weights.

    Raises:
        ConfigurationError: No weights are published under this name.
        CheckpointError: They could not be fetched; the message says which file to place where.
    """
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    config = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay or None)
    if not config.has_weights:
        raise ConfigurationError(
            f"no weights are published under {name}; build it with pretrained=False and load weights that "
            "repblocks.convert has mapped, for example its authors'"
        )
    place = place_of(config)
    if place.is_file() and not (overlay.keys() & {"file", "state_dict", "hf_hub_id", "url"}):
        overlay["file"] = str(place)
    arguments = {"pretrained": True, "pretrained_filter_fn": _in_our_names, "pretrained_cfg_overlay": overlay or None}
    try:
        return build(**arguments)
    except (OSError, RuntimeError) as error:
        file = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
        raise CheckpointError(
            f"cannot load the weights of {name} ({type(error).__name__}: {str(error).splitlines()[0]}); without "
            f"a network, place {file} at {place}, or give its path by pretrained_cfg_overlay={{'file': ...}}"
        ) from error


def place_of(config: PretrainedCfg) -> Path:
    """Where a file of published weights is looked for before timm fetches it."""
    theirs = str(config.hf_hub_id or config.architecture).rpartition("/")[2]
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{theirs}.safetensors"


def _in_our_names(weights: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    if weights.keys() == model.state_dict().keys():
        return weights
    assert isinstance(model, StagedNet)
    return ours_from_theirs(weights, model.foreign["timm"].rules(model), "timm's weights for this model")
