"""Test accuracy of a training checkpoint, or of a safetensors file of repblocks, in every form it has."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from torch import nn

from repblocks.blocks.base import deployed, form_of
from repblocks.checkpoint import load
from repblocks.errors import ConfigurationError
from repblocks.training import DataConfig, ImageData, model_from_checkpoint, readable_errors
from repblocks.training.console import quiet_lightning, summary_table
from repblocks.training.evaluation import require_fit
from repblocks.training.expansion import contracted
from repblocks.training.pipeline import VERIFIED_IMAGES
from repblocks.training.summary import Summary, measure
from repblocks.verification import verify

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXAMPLES = """examples:
  python scripts/validate.py runs/NAME/DATE/checkpoints/best.ckpt
  python scripts/validate.py runs/NAME/DATE/deploy/model.safetensors data=digits
  python scripts/validate.py best.ckpt data=imagefolder data.root=photos data.batch_size=32
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a .ckpt of train.py, or a .safetensors of rb.save or rb.export")
    parser.add_argument("overrides", nargs="*", metavar="data...", help="the data group's values, as for train.py")
    options = parser.parse_args(arguments)
    with readable_errors():
        summary = validate(options.checkpoint, options.overrides)
        get_console().print(summary_table(summary))


def validate(path: Path, overrides: Sequence[str] = ()) -> Summary:
    """Measure the model in ``path`` on the test images of the data that the overrides describe.

    Size and normalisation of the images are the model's own unless an override says otherwise.
    """
    quiet_lightning()
    model: Any = load(path) if path.suffix == ".safetensors" else model_from_checkpoint(path)
    data = ImageData(DataConfig.of(data_config([*preprocessing(model), *overrides])))
    require_fit(model, data)
    forms: dict[str, nn.Module] = {form_of(model): model.eval()}
    report = None
    if "train" in forms:
        forms["deploy"] = deployed(contracted(model))
        report = verify(model, forms["deploy"], data.test_images(VERIFIED_IMAGES))
    return Summary(model=model.model_name, data=data.config.name, forms=measure(forms, data), equivalence=report)


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
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config: DictConfig = compose("train", [*overrides])
    except HydraException as error:
        raise ConfigurationError(str(error)) from error
    values: Any = OmegaConf.to_container(config.data, resolve=True)
    return values


if __name__ == "__main__":
    sys.exit(main())
