"""Test accuracy of any model, in every form it has, on the data that overrides describe."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from repblocks.deploy_form import deploy_form_of
from repblocks.errors import ConfigurationError
from repblocks.models.registry import carry
from repblocks.training.data import DataConfig, ImageData
from repblocks.training.entry import configs
from repblocks.training.evaluation import require_fit
from repblocks.training.pipeline import VERIFIED_IMAGES
from repblocks.training.summary import Summary, measure
from repblocks.verification import verify


def validate(model: nn.Module, overrides: Sequence[str] = ()) -> Summary:
    """Measure a model on the test images of the data that the overrides describe.

    Size and normalisation of the images are the model's own unless an override says otherwise.

    Args:
        model: In eval mode; it is not changed.
        overrides: ``data=NAME`` and ``data.KEY=VALUE``, as for train.py.

    Raises:
        ConfigurationError: An override that is not about the data.
        DataError: Data of other classes or channels than the model's.
    """
    data = data_for(model, overrides)
    images = data.test_images(VERIFIED_IMAGES)
    shipped = deploy_form_of(model, images[:1])
    plain, differs = shipped.model, shipped.differs_from(model)
    forms = {"train": model, "deploy": plain} if differs else {"deploy": plain}
    report = verify(model, plain, images) if differs else None
    name = str(vars(model).get("model_name") or type(model).__name__)
    return Summary(model=name, data=data.config.name, forms=measure(forms, data), equivalence=report)


def data_for(model: nn.Module, overrides: Sequence[str]) -> ImageData:
    """The data that overrides describe, in the model's own preprocessing, where it has one.

    Raises:
        ConfigurationError: An override that is not about the data.
        DataError: Data of other classes or channels than the model's.
    """
    data = ImageData(DataConfig.of(data_config([*preprocessing(model), *overrides])))
    require_fit(model, data)
    return data


def completed(model: nn.Module, data: ImageData) -> nn.Module:
    """The model, with what its data says and it does not: preprocessing and class names."""
    facts = {**asdict(data.preprocessing), "label_names": list(data.class_names)}
    return carry(model, {key: value for key, value in facts.items() if not _config(model).get(key)})


def preprocessing(model: nn.Module) -> list[str]:
    """The model's own preprocessing as overrides; none for a model that does not say."""
    config = _config(model)
    if not config:
        return []
    values = {
        "in_chans": vars(model)["model_args"]["in_chans"],
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


def _config(model: nn.Module) -> Mapping[str, Any]:
    return vars(model).get("pretrained_cfg") or {}


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
