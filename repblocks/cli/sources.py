"""Models from what a command line can say: a name, a file, a folder, or a function of the user's."""

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from repblocks.checkpoint import load
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.models.registry import create_model

Size = Annotated[str | None, typer.Option("--size", help="Of images, such as 3x224x224; the model's own by default.")]
"""The option for models that do not say the size of their images, or take others."""

DEFAULT_SIZE = (3, 224, 224)
"""Of images for models that do not say theirs."""


def model_from(source: str) -> nn.Module:
    """The model that a source means, on the CPU and in eval mode.

    Args:
        source: A checkpoint of train.py (``.ckpt``), a file of ``rb.save`` or ``rb.export`` (``.safetensors``), a run
            or deploy folder, ``module:function`` whose call gives a module, or a name in timm's registry, whose weights
            are random unless it has a tag such as ``repvgg_a0.rvgg_in1k``.

    Raises:
        CheckpointError: A file that is missing, damaged or foreign.
        ConfigurationError: An unknown name, or a function that cannot be called or gives something else.
    """
    path = Path(source)
    if path.suffix in (".ckpt", ".safetensors") or path.is_dir():
        return _from_path(path).eval()
    if ":" in source and not source.startswith("hf"):
        return _from_function(*source.split(":", 1)).eval()
    return create_model(source, pretrained="." in source).eval()


def _from_path(path: Path) -> nn.Module:
    if path.suffix == ".safetensors":
        return load(path)
    if path.suffix == ".ckpt":
        from repblocks.training.checkpoints.restore import model_from_checkpoint

        return model_from_checkpoint(path)
    for inside in ("checkpoints/best.ckpt", "model.safetensors", "deploy/model.safetensors"):
        if (path / inside).exists():
            return _from_path(path / inside)
    raise CheckpointError(
        f"{path} holds no model: needed is a run folder with checkpoints/best.ckpt or a deploy folder with "
        "model.safetensors"
    )


def _from_function(module: str, function: str) -> nn.Module:
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"cannot call {module}:{function} ({error}); needed is an importable module, from the working directory "
            "too, with a function that takes no arguments and returns a torch.nn.Module"
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(made, nn.Module):
        raise ConfigurationError(f"{module}:{function} returned {type(made).__name__}, needed is a torch.nn.Module")
    return made


def size_of(model: nn.Module, size: str | None = None) -> tuple[int, int, int]:
    """``(channels, height, width)`` of a model's images: as asked for, as the model says, or the usual.

    Raises:
        ConfigurationError: ``size`` is not like ``3x224x224``.
    """
    if size is not None:
        return parsed_size(size)
    config: Mapping[str, Any] = vars(model).get("pretrained_cfg") or {}
    channels, height, width = config.get("input_size", DEFAULT_SIZE)
    return channels, height, width


def parsed_size(size: str) -> tuple[int, int, int]:
    """``(channels, height, width)`` from ``3x224x224``.

    Raises:
        ConfigurationError: It is something else.
    """
    try:
        channels, height, width = (int(part) for part in size.split("x"))
    except ValueError as error:
        raise ConfigurationError(f"--size {size} needs to be channels x height x width, such as 3x224x224") from error
    return channels, height, width


def random_images(count: int, size: tuple[int, int, int]) -> Tensor:
    """Images ``[count, *size]`` of normal numbers, the same each time."""
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def weights_in(path: Path) -> dict[str, Tensor]:
    """The weights in a file of any library: safetensors, or torch's without pickled code.

    Raises:
        CheckpointError: The file is missing or damaged, or holds no weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        from repblocks.training.checkpoints.files import read_checkpoint

        return _state_dict(path, read_checkpoint(path))
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}); use another copy") from error


def _state_dict(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in ("state_dict", "model", "model_state_dict", "state_dict_ema"):
        if isinstance(content.get(key), Mapping):
            return _state_dict(path, content[key])
    weights = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f"{path} holds no weights by name; needed is a state dict, or one under 'state_dict'")
    return weights


def arguments_from(values: list[str]) -> dict[str, Any]:
    """``key=value`` pairs, whose values are JSON where they can be.

    Raises:
        ConfigurationError: There is no ``=``.
    """
    return dict(_argument(value) for value in values)


def _argument(pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals:
        raise ConfigurationError(f"--arg {pair} needs to be KEY=VALUE, such as --arg num_classes=10")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
