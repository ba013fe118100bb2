"""Weights that timm itself loads: ``timm.create_model(name, checkpoint_path=...)``."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from repblocks.blocks.base import form_of
from repblocks.convert import convert
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.export.jobs import Job
from repblocks.header import FETCHING, describe
from repblocks.models.registry import FAMILIES

_ENTRY = "timm"
#: Of the weights: a model of timm's own; timm's multi-branch network, or that collapsed; a network of our own name.
_FORMS = ("plain", "branches", "reparameterized", "ours")


def write(job: Job, path: Path) -> dict[str, Any]:
    """Weights under timm's names, and the call that builds their model.

    Where timm has the network, plain timm loads them, in the form that the model was given in: timm's ``create_model``
    builds all branches, and ``timm.utils.reparameterize_model`` collapses them. Networks that timm has not (RepNeXt,
    other blocks, CIFAR's) are those of our own name, which timm knows once repblocks is imported.

    Raises:
        ConfigurationError: No registered name builds the model.
    """
    about = describe(job.deploy)
    weights, recipe = _timms_own(job, about) or _with_counterpart(job, about) or _by_our_name(job, about)
    tensors = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    save_file(tensors, path, metadata={"format": "pt", _ENTRY: json.dumps(recipe)})
    return {"load": _words(recipe), **recipe}


def open_file(path: Path) -> nn.Module:
    """The model that timm builds from the file, with its branches if it came with them.

    Raises:
        CheckpointError: The file was not written by `write`, or timm does not build that model.
    """
    recipe = _recipe(path)
    try:
        with torch.random.fork_rng(devices=[]):
            model = _loaded(path, recipe)
    except Exception as error:  # arguments and weights of a damaged file can make timm raise anything
        raise CheckpointError(f"timm does not build {recipe['model']!r} from {path}: {error}") from error
    return model.eval()


def _loaded(path: Path, recipe: Mapping[str, Any]) -> nn.Module:
    name, args, dtype = recipe["model"], recipe["args"], getattr(torch, recipe["dtype"])
    if recipe["form"] == "reparameterized":
        model = reparameterize_model(timm.create_model(name, **args).eval()).to(dtype)
        timm.models.load_checkpoint(model, str(path))
        return model
    return timm.create_model(name, checkpoint_path=str(path), **args).to(dtype)


def _timms_own(job: Job, about: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A model of timm's own, with the names it has."""
    if about["model"] is None or not timm.is_model(about["model"]):
        raise ConfigurationError(
            f"no registered name builds this {type(job.reference).__name__} (got {about['model']!r}), so timm cannot "
            "load it; make it with repblocks.create_model, or choose formats=('onnx',)"
        )
    if about["expansions"]:
        raise ConfigurationError(
            f"the model is an expanded {about['model']}, which timm does not build; export repblocks.contract(model)"
        )
    if about["model"] in FAMILIES:
        return None
    return job.deploy.state_dict(), _recipe_for(about, about["model"], about["args"], "plain")


def _with_counterpart(job: Job, about: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A network that timm has too, by timm's names, in the form in which it was given."""
    name = about["model"].removeprefix("rb_")
    form = form_of(job.reference)
    if not timm.is_model(name):
        return None
    args = about["args"]
    try:
        weights = convert(job.reference.state_dict(), model=about["model"], source="repblocks", target="timm", **args)
        theirs = _skeleton(name, args)
    except (ConfigurationError, CheckpointError, TypeError):
        return None
    theirs = theirs if form == "train" else reparameterize_model(theirs)
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    if shapes != {key: tensor.shape for key, tensor in weights.items()}:
        return None
    return weights, _recipe_for(about, name, args, "branches" if form == "train" else "reparameterized")


def _skeleton(name: str, args: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return copy.deepcopy(timm.create_model(name, **args)).eval()


def _by_our_name(job: Job, about: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return job.deploy.state_dict(), _recipe_for(about, about["model"], {**about["args"], "form": "deploy"}, "ours")


def _recipe_for(about: Mapping[str, Any], name: str, args: Mapping[str, Any], form: str) -> dict[str, Any]:
    return {"model": name, "args": dict(args), "form": form, "dtype": about["dtype"]}


def _words(recipe: Mapping[str, Any]) -> str:
    """The call that loads the file, for people."""
    arguments = "".join(f", {key}={value!r}" for key, value in recipe["args"].items())
    build = f"timm.create_model({recipe['model']!r}{arguments}"
    if recipe["form"] == "reparameterized":
        return f"timm.models.load_checkpoint(timm.utils.reparameterize_model({build})), 'model.timm.safetensors')"
    call = f"{build}, checkpoint_path='model.timm.safetensors')"
    collapsed = f"timm.utils.reparameterize_model({call}.eval())"
    return {"plain": call, "branches": collapsed, "ours": f"import repblocks; {call}"}[recipe["form"]]


def _recipe(path: Path) -> dict[str, Any]:
    try:
        if path.suffix != ".safetensors":  # by which timm tells them from pickles
            raise ValueError(f"its name ends in {path.suffix!r}, needed is '.safetensors'")
        with safe_open(path, framework="pt") as file:
            recipe = json.loads((file.metadata() or {})[_ENTRY])
        if recipe["form"] not in _FORMS:
            raise ValueError(f"form is {recipe['form']!r:.80}")
        if not isinstance(recipe["args"], dict) or FETCHING & recipe["args"].keys():
            raise ValueError(f"args are {recipe['args']!r:.80}")
        if not timm.is_model(recipe["model"]) or not isinstance(getattr(torch, recipe["dtype"]), torch.dtype):
            raise ValueError(f"model is {recipe['model']!r:.80}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} does not say which model timm has to build ({error!r}); export the model again"
        ) from error
    return recipe
