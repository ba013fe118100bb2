"""Models on disk: one safetensors file with weights, and in its header all that rebuilds the model."""

import copy
import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from repblocks.blocks.base import OTHER_FORM, RepBlock, deployed, form_of
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.files import replacing
from repblocks.header import built, carry_description, checked, damaged, describe, require_rebuildable

Form = Literal["train", "deploy"]

_ENTRY = "repblocks"


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model, in the form it has, to one safetensors file: ``load(path)`` gives the same function.

    The header holds the model's name and arguments as the model now is (after ``reset_classifier`` too), its form,
    class names, preprocessing, dtype, format version and package versions. The file appears at once or not at all.

    Args:
        model: Made by ``create_model`` or, for the names of the zoo, by ``timm.create_model``.
        path: A file, usually ``*.safetensors``; missing folders are made.

    Raises:
        CheckpointError: No registered name rebuilds this model, its class names are not as many as its classes, its
            weights have no values, or the file cannot be written.
    """
    path = Path(path)
    about = describe(model)
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise CheckpointError(
            f"cannot write {path}: the weights are on the meta device, so they have no values; load some with "
            "load_weights(model, weights, assign=True)"
        )
    require_rebuildable(model, about)
    weights, about["shared"] = _distinct(state)
    with replacing(path) as temporary:
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
    model = built(path, about)
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
            about = _header(path, file.metadata() or {})
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CheckpointError(_unreadable(path, error)) from error
    if lost := set(about["shared"].values()) - weights.keys():
        raise CheckpointError(damaged(path, f"shared names weights that the file lacks ({min(lost)!r})"))
    return about, weights


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _ENTRY not in metadata:
        raise CheckpointError(
            f"{path} holds weights, but repblocks.save did not write it, so it does not say which model they are for; "
            "map timm's names with repblocks.convert, and give the result to repblocks.checkpoint.load_weights"
        )
    try:
        about = checked(path, json.loads(metadata[_ENTRY]))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(damaged(path, repr(error))) from error
    shared = about.get("shared")
    if not isinstance(shared, dict) or not all(isinstance(name, str) for name in cast("Any", shared).values()):
        raise CheckpointError(damaged(path, f"shared is {shared!r:.80}"))
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
