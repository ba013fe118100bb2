"""Test accuracy of a checkpoint, or of a file of repblocks, in every form it has."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from repblocks.blocks.base import deployed, form_of
from repblocks.checkpoint import load
from repblocks.errors import ConfigurationError
from repblocks.training.checkpoints.restore import model_from_checkpoint
from repblocks.training.data import DataConfig, ImageData
from repblocks.training.entry import configs
from repblocks.training.evaluation import require_fit
from repblocks.training.expansion import contracted
from repblocks.training.pipeline import VERIFIED_IMAGES
from repblocks.training.summary import Summary, measure
from repblocks.verification import verify


def validate(path: Path, overrides: Sequence[str] = ()) -> Summary:
    """Measure the model in ``path`` on the test images of the data that the overrides describe.

    Size and normalisation of the images are the model's own unless an override says otherwise.
    """
    model: Any = load(path) if path.suffix == ".safetensors" else model_from_checkpoint(path)
    data = data_for(model, overrides)
    forms: dict[str, nn.Module] = {form_of(model): model.eval()}
    report = None
    if "train" in forms:
        forms["deploy"] = deployed(contracted(model))
        report = verify(model, forms["deploy"], data.test_images(VERIFIED_IMAGES))
    return Summary(model=model.model_name, data=data.config.name, forms=measure(forms, data), equivalence=report)


def data_for(model: Any, overrides: Sequence[str]) -> ImageData:
    """The data that overrides describe, in the model's own preprocessing.

    Raises:
        ConfigurationError: An override that is not about the data.
        DataError: Data of other classes or channels than the model's.
    """
    data = ImageData(DataConfig.of(data_config([*preprocessing(model), *overrides])))
    require_fit(model, data)
    return data


def preprocessing(model: Any) -> list[str]:
    """The model's own preprocessing as overrides."""
    config = model.pretrained_cfg
    values = {
        "in_chans": model.model_args["in_chans"],
        "image_size": list(config["input_size"][1:]),
        "eval_size": "null",
        "progressive": "{}",
        "in_memory": "false",
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
    }
    return [f"data.{key}={value}" for key, value in values.items()]


def data_config(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose the data group as train.py does."""
    others = [override for override in overrides if not re.match(r"[+~]*data[.=]", override)]
    if others:
        raise ConfigurationError(f"{others[0]!r} is not about the data; only data=NAME and data.KEY=VALUE apply here")
    try:
        with initialize_config_dir(str(configs()), version_base="1.3"):
            config: DictConfig = compose("train", [*overrides])
    except HydraException as error:
        raise ConfigurationError(str(error)) from error
    values: Any = OmegaConf.to_container(config.data, resolve=True)
    return values
