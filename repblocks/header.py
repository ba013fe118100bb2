"""What a file says about its model: described, checked, and built again."""

import inspect
import json
from collections.abc import Mapping, Set
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from torch import Tensor, nn

from repblocks.blocks.base import form_of, switch_to_deploy
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.expansion.expand import expand
from repblocks.expansion.recipe import Recipe, is_recipe, recipe_of
from repblocks.models.registry import Model, carry, create_model

#: Raised by one whenever an older repblocks could not read the file any more.
FORMAT_VERSION = 1
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct")

_REMEDY = (
    "A model of your own (edited or collapsed) is saved by torch.export.save(torch.export.export(model, "
    "(images,)), path), or by its state_dict next to the code that makes it."
)
#: Arguments of timm that read or fetch other files.
FETCHING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def describe(model: nn.Module) -> dict[str, Any]:
    """What rebuilds a model (name, arguments, expansions; no name for one of the user's own) and what it gives.

    Raises:
        CheckpointError: Its class names are not as many as its classes.
    """
    config: dict[str, Any] = vars(model).get("pretrained_cfg", {})
    args = _current_args(model)
    classes, count = config.get("label_names"), args.get("num_classes")
    if classes and count and len(classes) != count:
        raise CheckpointError(
            f"the model has {count} classes and {len(classes)} class names; set model.pretrained_cfg['label_names'] to "
            f"{count} names, or to None"
        )
    return {
        "format_version": FORMAT_VERSION,
        "model": vars(model).get("model_name"),
        "args": args,
        "form": form_of(model),
        "expansions": list(recipe_of(model)),
        "classes": list(classes) if classes else None,
        "preprocessing": {key: config[key] for key in PREPROCESSING if key in config},
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "versions": {package: version(package) for package in ("repblocks", "torch", "timm")},
    }


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter, else buffer, else torch's default one."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())


def checked(path: Path, about: object) -> dict[str, Any]:
    """The description that a file holds, if it is one that ``describe`` made and this version reads.

    Raises:
        CheckpointError: An entry is missing or of another type, or the format is too new.
    """
    if not isinstance(about, dict):
        raise CheckpointError(damaged(path, f"it is {about!r:.80}, not a dict"))
    entries = cast("dict[str, Any]", about)
    written = entries.get("format_version")
    if not isinstance(written, int):
        raise CheckpointError(damaged(path, f"format_version is {written!r:.80}, not a number"))
    if written > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {written}, and this repblocks {version('repblocks')} reads up to "
            f"{FORMAT_VERSION}; upgrade with pip install --upgrade repblocks"
        )
    valid = {
        "model": isinstance(entries.get("model"), str),
        "args": isinstance(entries.get("args"), dict),
        "form": entries.get("form") in ("train", "deploy"),
        "expansions": is_recipe(entries.get("expansions", [])),
        "classes": "classes" in entries and isinstance(entries["classes"], list | None),
        "preprocessing": isinstance(entries.get("preprocessing"), dict),
    }
    if wrong := [f"{key} is {entries.get(key, 'missing')!r:.80}" for key, is_valid in valid.items() if not is_valid]:
        raise CheckpointError(damaged(path, ", ".join(wrong)))
    return entries


def damaged(path: Path, why: str) -> str:
    """The message for a header that no ``save`` wrote."""
    return f"the repblocks header of {path} is damaged: {why}; use another copy, or save the model again"


def built(path: Path, about: Mapping[str, Any]) -> nn.Module:
    """The architecture of a ``checked`` description, in its form, mostly on the meta device.

    Give it weights by ``load_weights(model, weights, assign=True)``.

    Raises:
        CheckpointError: The model is not registered here, is not built by the arguments, or they ask for a download.
    """
    name, args = about["model"], about["args"]
    if not timm.is_model(name):
        raise CheckpointError(
            f"{path} is for a model named {name!r}, which is not registered here; import the module that registers it "
            "with timm, then load again"
        )
    if FETCHING & args.keys():
        raise CheckpointError(f"{path} asks to fetch other files ({args}), which a file may not; do not trust it")
    try:
        return _architecture(about)
    except Exception as error:  # arguments of a damaged file can make a constructor raise anything
        raise CheckpointError(
            f"{path} is for {name} with {args}, which this version does not build: {error}"
        ) from error


def carry_description(model: Model, about: Mapping[str, Any]) -> Model:
    """Put the class names and the preprocessing of a description where timm keeps them."""
    facts = {key: tuple(value) if isinstance(value, list) else value for key, value in about["preprocessing"].items()}
    facts["label_names"] = tuple(about["classes"]) if about["classes"] else None
    facts |= {key: value for key, value in about["args"].items() if key == "num_classes"}
    return carry(model, facts)


def require_rebuildable(model: nn.Module, about: Mapping[str, Any]) -> None:
    """Check that a description gives this model again, layer by layer.

    Raises:
        CheckpointError: It names no registered model, or builds another one.
    """
    if about["model"] is None or not timm.is_model(about["model"]):
        raise CheckpointError(
            f"this {type(model).__name__} carries no registered model name (got {about['model']!r}), so no file could "
            f"rebuild it; build it with repblocks.create_model and save that. {_REMEDY}"
        )
    try:
        args = json.loads(json.dumps(about["args"]))
        rebuilt = _architecture({**about, "args": args})
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise CheckpointError(f"{about['model']} is not rebuilt by {about['args']}: {error}. {_REMEDY}") from error
    ours, theirs = _structure(model), _structure(rebuilt)
    different = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if different:
        name = different[0]
        raise CheckpointError(
            f"{about['model']} with {args} does not rebuild this model: {name!r} is {theirs.get(name, 'absent')} there "
            f"and {ours.get(name, 'absent')} here ({len(different)} such differences). {_REMEDY}"
        )


def _current_args(model: nn.Module) -> dict[str, Any]:
    """The arguments that build the model as it is now: ``reset_classifier`` changes classes and pooling."""
    facts = vars(model)
    args = dict(facts.get("model_args", {}))
    if "num_classes" in facts:
        args["num_classes"] = facts["num_classes"]
    pools = {module.pool_type for module in model.modules() if isinstance(module, SelectAdaptivePool2d)}
    if len(pools) == 1 and (pool := pools.pop()) != args.get("global_pool", "avg"):
        args["global_pool"] = pool
    if (pool := _pool_name(model)) is not None and "global_pool" in inspect.signature(type(model)).parameters:
        args["global_pool"] = pool
    return args


def _structure(model: nn.Module) -> dict[str, str]:
    """Every module and tensor in words."""
    words = {name: _words(module) for name, module in model.named_modules()}
    return words | {key: f"a tensor of shape {tuple(tensor.shape)}" for key, tensor in model.state_dict().items()}


def _words(module: nn.Module) -> str:
    """What defines a module's function; SyncBatchNorm is what distributed training makes of a BatchNorm."""
    kind = "BatchNorm2d" if isinstance(module, nn.SyncBatchNorm) else type(module).__name__
    pool = _pool_name(module)
    patched = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    return (
        f"{kind}({module.extra_repr()})"
        + (f" with global_pool={pool!r}" if pool is not None else "")
        + (f" with {', '.join(patched)} replaced on the instance" if patched else "")
    )


def _pool_name(module: nn.Module) -> str | None:
    """The pooling of timm's transformers, which is no layer."""
    pool = vars(module).get("global_pool")
    return pool if isinstance(pool, str) else None


def _build(about: Mapping[str, Any], device: str) -> nn.Module:
    """The architecture of a header, with arbitrary weights; torch's random numbers stay as they were."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        model = _expanded(create_model(about["model"], **about["args"]), about.get("expansions", []))
        if about["form"] == "deploy":
            switch_to_deploy(model.eval())
    return model


def _expanded(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model after the expansions of a recipe.

    Raises:
        ConfigurationError: The model has no such convolutions, or this version expands others.
    """
    for step in recipe:
        names = set(step["convolutions"])
        model, report = expand(model, step["block"], where=partial(_is_among, names), init=step["init"])
        if different := names.symmetric_difference(row.name for row in report.expanded):
            reasons = "; ".join(map(str, report.skipped)) or "the model has no convolution of that name"
            raise ConfigurationError(f"{min(different)!r} is not expanded by {step['block']!r}: {reasons}")
    return model


def _is_among(names: Set[str], name: str, conv: nn.Module) -> bool:
    return name in names


def _architecture(about: Mapping[str, Any]) -> nn.Module:
    """The model of a header, without memory for its weights where it can be built and used like that."""
    if about.get("expansions"):  # an expansion computes with the weights
        return _build(about, "cpu")
    try:
        model = _build(about, "meta")
    except RuntimeError:  # it computes with the values of its tensors while it is built
        return _build(about, "cpu")
    return _build(about, "cpu") if _has_tensors_beside_its_weights(model) else model


def _has_tensors_beside_its_weights(model: nn.Module) -> bool:
    """Whether loading every weight would leave a tensor without values."""
    weights = model.state_dict().keys()
    attributes = (value for module in model.modules() for value in vars(module).values())
    return any(name not in weights for name, _ in model.named_buffers()) or any(
        isinstance(value, Tensor) for value in attributes
    )
