"""Models from what a command line can say: a name, a file, a folder, or a function of the user's."""

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import Tensor, nn

from repblocks.checkpoint import load_weights
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.export import FORMATS, DeployModel, load_deploy, manifest
from repblocks.export.formats import require_packages
from repblocks.models.registry import create_model
from repblocks.report.sources import model_at

Source = Annotated[
    str, typer.Argument(help="A checkpoint, a run or deploy folder, a name, NAME@WEIGHTS, or module:function.")
]
"""What `model_from` understands."""

Size = Annotated[str | None, typer.Option("--size", help="Of images, such as 3x224x224; the model's own by default.")]
"""The option for models that do not say the size of their images, or take others."""

DEFAULT_SIZE = (3, 224, 224)
"""Of images for models that do not say theirs."""


def model_from(source: str) -> nn.Module:
    """The model that a source means, on the CPU and in eval mode.

    Args:
        source: A checkpoint of train.py (``.ckpt``), a file of ``rb.save`` or ``rb.export`` (``.safetensors``), a run
            or deploy folder, ``module:function`` whose call gives a module, a name in timm's registry, whose weights
            are random unless it has a tag such as ``repvgg_a0.rvgg_in1k``, or ``name@file`` with weights of one's own.

    Raises:
        CheckpointError: A file that is missing, damaged or foreign, or weights of another model.
        ConfigurationError: An unknown name, or a function that cannot be called or gives something else.
    """
    path = Path(source)
    name, at, weights = source.partition("@")
    if at and not path.exists():
        return _from_weights(name, Path(weights)).eval()
    if path.suffix in (".ckpt", ".safetensors") or path.is_dir():
        return model_at(path).eval()
    if ":" in source and not source.startswith("hf"):
        return _from_function(*source.split(":", 1)).eval()
    return create_model(source, pretrained="." in source).eval()


def program_from(source: str) -> Any:
    """What executes a source: the runtime of a deploy graph (``.onnx``, ``.pt2``, ``.xml``, ``.pte``), or a model.

    A graph in a deploy folder is only opened if it is the one that was exported, and takes normalised images.

    Raises:
        CheckpointError: As `model_from`; or the graph is damaged, or not the one that was exported.
        ConfigurationError: As `model_from`; or its runtime is not installed, or it takes pixels.
    """
    path = Path(source)
    graphs = {Path(format.filename).suffix: name for name, format in FORMATS.items() if format.holds == "graph"}
    if path.suffix not in graphs:
        return model_from(source)
    if (path.parent / manifest.NAME).is_file():
        return _taking_normalized(load_deploy(path))
    name = graphs[path.suffix]
    require_packages(name, FORMATS[name])
    return FORMATS[name].open(path, *(path.with_suffix(Path(beside).suffix) for beside in FORMATS[name].beside))


def _taking_normalized(deploy: DeployModel) -> DeployModel:
    if deploy.file.pixels != "normalized":
        raise ConfigurationError(
            f"{deploy.file.paths[0]} takes pixels ({deploy.file.pixels}), and models are compared on normalised "
            'images; compare what repblocks.export(..., pixels="normalized") writes'
        )
    return deploy


def _from_weights(name: str, path: Path) -> nn.Module:
    weights = weights_in(path)
    model = create_model(name, **_arguments_of(name, weights))
    try:
        load_weights(model, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit {name}: {error}") from error
    return model


def _arguments_of(name: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The number of classes and of input channels, by the layers that timm calls classifier and first convolution."""
    with torch.device("meta"):
        config: Mapping[str, Any] = vars(create_model(name)).get("pretrained_cfg") or {}
    places = {"num_classes": ("classifier", 0), "in_chans": ("first_conv", 1)}
    found = {key: (weights.get(f"{config.get(layer)}.weight"), axis) for key, (layer, axis) in places.items()}
    return {key: weight.shape[axis] for key, (weight, axis) in found.items() if weight is not None}


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


def weights_in(path: Path) -> dict[str, Tensor]:
    """The weights in a file of any library: safetensors, or torch's without pickled code; of two, the averaged ones.

    Raises:
        CheckpointError: The file is missing or damaged, or holds no weights.
    """
    try:
        content = timm.models.load_state_dict(str(path))
    except Exception as error:  # a damaged file can make an unpickler raise anything
        raise CheckpointError(
            f"{path.absolute()} cannot be read as weights ({error!r:.300}); needed is a safetensors file, or one of "
            "torch.save with tensors and plain values alone, for other objects can run code"
        ) from error
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
