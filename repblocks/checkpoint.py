"""Models on disk: one safetensors file with weights, and in its header all that rebuilds the model."""

import copy
import json
import os
import secrets
from collections.abc import Generator, Mapping, Set
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from torch import Tensor, nn

from repblocks.blocks.base import OTHER_FORM, RepBlock, deployed, form_of, switch_to_deploy
from repblocks.errors import CheckpointError, ConfigurationError, RepblocksError
from repblocks.models.registry import Model, carry, create_model

Form = Literal["train", "deploy"]

#: Raised by one whenever an older repblocks could not read the file any more.
FORMAT_VERSION = 1
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct")

_ENTRY = "repblocks"
_REMEDY = (
    "A model of your own (edited, collapsed or expanded) is saved by torch.export.save(torch.export.export(model, "
    "(images,)), path), or by its state_dict next to the code that makes it."
)
_FETCHING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_REQUIRED = ("model", "args", "form", "classes", "preprocessing", "shared")


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model, in the form it has, to one safetensors file: ``load(path)`` gives the same function.

    The header holds the model's name and arguments as the model now is (after ``reset_classifier`` too), its form,
    class names, preprocessing, dtype, format version and package versions. The file appears at once or not at all.

    Args:
        model: Made by ``create_model`` or, for the names of the zoo, by ``timm.create_model``.
        path: A file, usually ``*.safetensors``; missing folders are made.

    Raises:
        CheckpointError: No registered name rebuilds this model, or its class names are not as many as its classes.
    """
    about = describe(model)
    _require_rebuildable(model, about)
    weights, about["shared"] = _distinct(model.state_dict())
    with replacing(Path(path)) as temporary:
        # One entry only: safetensors writes several in random order, and equal models should give equal files.
        save_file(weights, temporary, metadata={_ENTRY: json.dumps(about)})


def load(path: str | Path, *, form: Form | None = None) -> nn.Module:
    """Rebuild the model of a file that ``save`` wrote, on the CPU, in eval mode and in its own dtypes.

    Args:
        path: The file.
        form: ``None`` for the form in the file; ``"deploy"`` collapses a train-form file after loading.

    Raises:
        CheckpointError: The file is missing, truncated, foreign or too new, its model is not registered here, its
            weights do not fit, or the train form was asked of a deploy-form file.
        ConfigurationError: An unknown ``form``.
    """
    if form not in (None, "train", "deploy"):
        raise ConfigurationError(f"unknown form {form!r}; use 'train', 'deploy', or None for the form in the file")
    path = Path(path)
    about, weights = _read(path)
    model = _built(path, about)
    if form == "train" and about["form"] == "deploy" and _blocks(model):
        raise CheckpointError(
            f"{path} holds the deploy form of {about['model']}, and collapsing cannot be undone; load a file that was "
            "saved before switch_to_deploy, or load this one with form='deploy'"
        )
    try:
        load_weights(model, _tied(model, weights, about["shared"]), assign=True)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit {about['model']}, which it names: {error}") from error
    carry_description(model, about)
    return deployed(model) if form == "deploy" else model.eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Load a state dict strictly, and say so in one sentence if it belongs to the other form.

    Args:
        model: In train or deploy form; unchanged if this raises.
        weights: A state dict.
        assign: Use the given tensors, with their dtypes, instead of copying them.

    Raises:
        CheckpointError: Names or shapes differ; the message names the form that was expected if that is the reason.
    """
    own = model.state_dict()
    missing, unexpected = own.keys() - weights.keys(), weights.keys() - own.keys()
    misshapen = {key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape}
    if missing and unexpected and _are_of_the_other_form(model, weights):
        raise CheckpointError(OTHER_FORM[form_of(model)])
    if missing or unexpected or misshapen:
        raise CheckpointError(_misfit(missing, unexpected, misshapen))
    model.load_state_dict(weights, assign=assign)


def describe(model: nn.Module) -> dict[str, Any]:
    """What rebuilds a model (name and arguments; None for a model of the user's own) and what its outputs mean.

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
        "classes": list(classes) if classes else None,
        "preprocessing": {key: config[key] for key in PREPROCESSING if key in config},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": {package: version(package) for package in ("repblocks", "torch", "timm")},
    }


def carry_description(model: Model, about: Mapping[str, Any]) -> Model:
    """Put the class names and the preprocessing of a description where timm keeps them."""
    facts = {key: tuple(value) if isinstance(value, list) else value for key, value in about["preprocessing"].items()}
    facts["label_names"] = tuple(about["classes"]) if about["classes"] else None
    facts |= {key: value for key, value in about["args"].items() if key == "num_classes"}
    return carry(model, facts)


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Give a temporary name beside ``path``; what was written there replaces ``path`` at the end, or vanishes.

    The content is on the disk before the old file goes, so at every moment there is one complete file or none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _current_args(model: nn.Module) -> dict[str, Any]:
    """The arguments that build the model as it is now: ``reset_classifier`` changes classes and pooling."""
    facts = vars(model)
    args = dict(facts.get("model_args", {}))
    if "num_classes" in facts:
        args["num_classes"] = facts["num_classes"]
    pools = {module.pool_type for module in model.modules() if isinstance(module, SelectAdaptivePool2d)}
    if len(pools) == 1 and (pool := pools.pop()) != args.get("global_pool", "avg"):
        args["global_pool"] = pool
    return args


def _require_rebuildable(model: nn.Module, about: Mapping[str, Any]) -> None:
    if about["model"] is None or not timm.is_model(about["model"]):
        raise CheckpointError(
            f"this {type(model).__name__} carries no registered model name (got {about['model']!r}), so no file could "
            f"rebuild it; build it with repblocks.create_model and save that. {_REMEDY}"
        )
    try:
        args = json.loads(json.dumps(about["args"]))
        rebuilt = _architecture({**about, "args": args})
    except TypeError as error:
        raise CheckpointError(f"{about['model']} is not rebuilt by {about['args']}: {error}. {_REMEDY}") from error
    ours, theirs = _structure(model), _structure(rebuilt)
    different = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if different:
        name = different[0]
        raise CheckpointError(
            f"{about['model']} with {args} does not rebuild this model: {name!r} is {theirs.get(name, 'absent')} there "
            f"and {ours.get(name, 'absent')} here ({len(different)} such differences). {_REMEDY}"
        )


def _structure(model: nn.Module) -> dict[str, str]:
    """Every module and tensor in words; SyncBatchNorm is what distributed training makes of a BatchNorm."""
    words = {name: _words(module) for name, module in model.named_modules()}
    return words | {key: f"a tensor of shape {tuple(tensor.shape)}" for key, tensor in model.state_dict().items()}


def _words(module: nn.Module) -> str:
    kind = "BatchNorm2d" if isinstance(module, nn.SyncBatchNorm) else type(module).__name__
    return f"{kind}({module.extra_repr()})"


def _distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, contiguous and on its own; and for tied ones the name under which it is kept."""
    names: dict[Any, str] = {}
    weights: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        kept = names.setdefault(memory, name) if tensor.numel() else name
        if kept == name:
            weights[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        else:
            shared[name] = kept
    return weights, shared


def _build(about: Mapping[str, Any], device: str) -> nn.Module:
    """The architecture of a header, with arbitrary weights; torch's random numbers stay as they were."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        model = create_model(about["model"], **about["args"])
        if about["form"] == "deploy":
            switch_to_deploy(model.eval())
    return model


def _architecture(about: Mapping[str, Any]) -> nn.Module:
    """The model of a header, without memory for its weights where it can be built and used like that."""
    try:
        model = _build(about, "meta")
    except RuntimeError:  # it computes with the values of its tensors while it is built
        return _build(about, "cpu")
    return _build(about, "cpu") if _has_tensors_beside_its_weights(model) else model


def _built(path: Path, about: Mapping[str, Any]) -> nn.Module:
    name, args = about["model"], about["args"]
    if not timm.is_model(name):
        raise CheckpointError(
            f"{path} is for a model named {name!r}, which is not registered here; import the module that registers it "
            "with timm, then load again"
        )
    if _FETCHING & args.keys():
        raise CheckpointError(f"{path} asks to fetch other files ({args}), which a file may not; do not trust it")
    try:
        return _architecture(about)
    except (RepblocksError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is for {name} with {args}, which this version does not build: {error}"
        ) from error


def _has_tensors_beside_its_weights(model: nn.Module) -> bool:
    """Whether loading every weight would leave a tensor without values."""
    weights = model.state_dict().keys()
    attributes = (value for module in model.modules() for value in vars(module).values())
    return any(name not in weights for name, _ in model.named_buffers()) or any(
        isinstance(value, Tensor) for value in attributes
    )


def _blocks(model: nn.Module) -> dict[str, RepBlock]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RepBlock)}


def _are_of_the_other_form(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    if form_of(model) == "train":
        return deployed(copy.deepcopy(model).to("meta")).state_dict().keys() == weights.keys()
    prefixes = tuple(f"{name}.".lstrip(".") for name in _blocks(model))
    return all(key.startswith(prefixes) for key in model.state_dict().keys() ^ weights.keys())


def _misfit(missing: Set[str], unexpected: Set[str], misshapen: Set[str]) -> str:
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    parts = [f"{len(keys)} {kind} (such as {min(keys)!r})" for kind, keys in kinds.items() if keys]
    return (
        f"the weights do not fit the model: {', '.join(parts)}; build the model with the name and arguments that the "
        "weights were trained with (num_classes and in_chans among them)"
    )


def _tied(model: nn.Module, weights: Mapping[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    """All names again, tied parameters as one object."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = {name: nn.Parameter(weights[name]) for name in set(shared.values()) & parameters.keys()}
    return {name: kept.get(name, weights[name]) for name in weights} | {
        name: kept.get(source, weights[source]) for name, source in shared.items()
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked header and the weights of a file; copied, because a mapped file can change under a model."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path.absolute()}; give the path of a file that repblocks.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            about = _checked(path, file.metadata() or {})
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CheckpointError(_unreadable(path, error)) from error
    return about, weights


def _checked(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _ENTRY not in metadata:
        raise CheckpointError(
            f"{path} holds weights, but repblocks.save did not write it, so it does not say which model they are for; "
            "map timm's names with repblocks.convert, and give the result to repblocks.checkpoint.load_weights"
        )
    try:
        about = cast("dict[str, Any]", json.loads(metadata[_ENTRY]))
        written = about["format_version"]
        lacking = [key for key in _REQUIRED if key not in about] if written <= FORMAT_VERSION else []
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the repblocks header of {path} is damaged ({error!r}); use another copy") from error
    if written > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {written}, and this repblocks {version('repblocks')} reads up to "
            f"{FORMAT_VERSION}; upgrade with pip install --upgrade repblocks"
        )
    if lacking:
        raise CheckpointError(f"the repblocks header of {path} is damaged: it lacks {lacking}; use another copy")
    return about


def _unreadable(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        return f"{path} is truncated or damaged ({error}); use another copy, or save it again"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return (
            f"{path} is a pickle or archive of torch.save, which can run code when read; load it with "
            "torch.load(path, weights_only=True), give its state dict to repblocks.checkpoint.load_weights, and save "
            "the model with repblocks.save"
        )
    return f"{path} is not a safetensors file ({error}); give a file that repblocks.save wrote"
