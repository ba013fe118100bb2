"""Other libraries' weights, renamed into ours and back."""

import functools
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from repblocks.blocks.base import Form, RepConv, deployed
from repblocks.blocks.norm_linear import NormLinear
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.foreign import Names, ours_from_theirs, theirs_from_ours
from repblocks.foreign.rules import Rules, our_names, require_two_way, share_matched, some, their_names
from repblocks.models import create_model
from repblocks.models.registry import FAMILIES
from repblocks.models.staged import StagedNet
from repblocks.names import known_name

OURS = "repblocks"

#: Part of the keys that the rules of a family's first network must know before all of the family are tried.
_FAMILIAR = 0.3


def convert(
    state_dict: Mapping[str, Tensor],
    *,
    model: str | None = None,
    source: str | None = None,
    target: str = OURS,
    **model_args: Any,
) -> dict[str, Tensor]:
    """Rename another library's weights for our model, or ours for another library; the tensors are shared.

    The form stays: weights of a training form give a training form, collapsed ones a deploy form. Where a repository
    leaves BatchNorms in its collapsed form, they are folded.

    Args:
        state_dict: Weights by name, as ``module.state_dict()`` gives them.
        model: Our name of the model, such as ``rb_repvgg_a0``; None to tell it by the weights.
        source: Where the names come from: ``timm``, a repository (``repvgg``, ``mobileone``, ...), or ``repblocks``
            together with a ``target``; None to tell it by the weights.
        target: Whose names to give: ``repblocks``, or another library's.
        model_args: What our model is built with where it is not the default, such as ``num_classes=10``.

    Raises:
        ConfigurationError: An unknown model, source or target, no rules for this model, or weights that fit several
            models or sources, which the message lists.
        CheckpointError: Names that the rules do not know, missing weights, or shapes that are not the model's.
    """
    if source is None and target != OURS:
        source = OURS
    if source == OURS and model is not None:
        return _to_theirs(state_dict, model, target, model_args)
    if model is None or source is None:
        model, source = detect(state_dict, model=model, source=source, **model_args)
    return _to_ours(state_dict, model, source, target, model_args)


def detect(
    state_dict: Mapping[str, Tensor], *, model: str | None = None, source: str | None = None, **model_args: Any
) -> tuple[str, str]:
    """Our name of the model that weights belong to, and whose names they have.

    Args:
        state_dict: Weights by name.
        model: Its name, where it is known.
        source: Whose names, where that is known.
        model_args: As of `convert`.

    Raises:
        ConfigurationError: They fit several; the message lists them.
        CheckpointError: They fit none.
    """
    if model is not None:
        known_name("model", model, FAMILIES)
    likely = [
        (name, origin)
        for names, origins in _familiar(list(state_dict), model)
        for name, origin in product(names, origins)
        if source in (None, origin)
    ]
    fits = [pair for pair in likely if len(likely) == 1 or _is_fit(state_dict, *pair, model_args)]
    if not fits:
        known = ", ".join(sorted({name for family in FAMILIES.values() for name in family.foreign}))
        raise CheckpointError(
            f"{len(state_dict)} keys ({some(list(state_dict))}) are no weights of {model or 'any model here'} by the "
            f"names of {source or known}; give the state dict itself (checkpoints often hold it under 'state_dict' or "
            "'model'), and num_classes=... and in_chans=... where they are not the defaults"
        )
    if len({name for name, _ in fits}) > 1 or (len(fits) > 1 and not _agree(state_dict, fits, model_args)):
        listed = " or ".join(f"model={name!r}, source={origin!r}" for name, origin in fits)
        raise ConfigurationError(f"the weights fit several; say which: {listed}")
    return fits[0]


def _is_fit(state_dict: Mapping[str, Tensor], model: str, source: str, model_args: Mapping[str, Any]) -> bool:
    try:
        _to_ours(state_dict, model, source, OURS, model_args)
    except CheckpointError:
        return False
    return True


def _familiar(keys: list[str], model: str | None) -> Iterator[tuple[list[str], list[str]]]:
    """The names of each family, and the sources whose rules know a good part of the keys, by its first network."""
    families: dict[type[StagedNet], list[str]] = {}
    for name, family in FAMILIES.items():
        families.setdefault(family, []).append(name)
    for family, members in families.items():
        names = [name for name in members if model in (None, name)]
        if names and family.foreign:
            network = _outline(names[0])
            shares = {origin: share_matched(keys, by.rules_for(network, keys)) for origin, by in family.foreign.items()}
            yield names, [origin for origin, share in shares.items() if share >= _FAMILIAR]


def _agree(state_dict: Mapping[str, Tensor], fits: list[tuple[str, str]], model_args: Mapping[str, Any]) -> bool:
    """Whether several sources rename a model's weights alike, as repositories with the same names do."""
    network, keys = _skeleton(fits[0][0], "train", model_args), list(state_dict)
    renamings = [our_names(keys, network.foreign[origin].rules_for(network, keys)) for _, origin in fits]
    return all(renaming == renamings[0] for renaming in renamings)


def _to_ours(
    state_dict: Mapping[str, Tensor], model: str, source: str, target: str, model_args: Mapping[str, Any]
) -> dict[str, Tensor]:
    network = _skeleton(model, "train", model_args)
    rules = _names(network, source, target).rules_for(network, list(state_dict))
    renamed = ours_from_theirs(state_dict, rules, f"{source}'s counterpart of {model}")
    form = _form(renamed)
    expected = (network if form == "train" else deployed(network)).state_dict()
    if renamed.keys() != expected.keys():
        completed = _completed(renamed, network, _described(model, "deploy", model_args))
        if completed is not None:
            return completed
    shaped = {key: _shaped(tensor, expected.get(key)) for key, tensor in renamed.items()}
    _check(shaped, expected, _described(model, form, model_args))
    return shaped


def _to_theirs(
    state_dict: Mapping[str, Tensor], model: str, target: str, model_args: Mapping[str, Any]
) -> dict[str, Tensor]:
    network = _skeleton(model, "train", model_args)
    names = _names(network, OURS, target)
    require_two_way(names, target)
    form = _form(state_dict)
    expected = _skeleton(model, form, model_args).state_dict()
    _check(state_dict, expected, _described(model, form, model_args))
    rules = names.rules(network)
    return theirs_from_ours(_with_norms(state_dict, network, rules, target), rules, f"{model} of {OURS}")


def _names(network: StagedNet, source: str, target: str) -> Names:
    if (source == OURS) == (target == OURS):
        raise ConfigurationError(
            f"cannot convert from {source!r} to {target!r}: one of them, and only one, is {OURS!r}"
        )
    other, family = target if source == OURS else source, type(network)
    everyone = sorted({name for known in FAMILIES.values() for name in known.foreign})
    if other not in everyone:
        raise ConfigurationError(f"cannot convert from or to {other!r}; there are rules for {', '.join(everyone)}")
    if other not in family.foreign:
        known = ", ".join(sorted({known.__name__ for known in FAMILIES.values() if other in known.foreign}))
        raise ConfigurationError(f"there are no rules between {other} and {family.__name__}, only for {known}")
    return family.foreign[other]


def _form(weights: Mapping[str, Tensor]) -> Form:
    return "train" if any(".branches." in key for key in weights) else "deploy"


def _described(model: str, form: Form, model_args: Mapping[str, Any]) -> str:
    return f"{model} in {form} form with {dict(model_args)}"


def _completed(weights: Mapping[str, Tensor], network: StagedNet, what: str) -> dict[str, Tensor] | None:
    """Weights of which some blocks are collapsed and others are not, with all of them collapsed.

    None where they are not that.
    """
    blocks = [(name, block) for name, block in network.named_modules() if isinstance(block, RepConv | NormLinear)]
    for name, block in blocks:
        if weights.keys() & {f"{name}.conv.weight", f"{name}.linear.weight"}:
            block.eval().switch_to_deploy()
    expected = network.state_dict()
    shaped = {key: _shaped(tensor, expected.get(key)) for key, tensor in weights.items()}
    if shaped.keys() != expected.keys():
        return None
    _check(shaped, expected, what)
    network.load_state_dict(shaped, assign=True)
    return deployed(network).state_dict()


def _with_norms(weights: Mapping[str, Tensor], network: StagedNet, rules: Rules, target: str) -> Mapping[str, Tensor]:
    """Weights in which collapsed blocks that their deploy form does not know are convolution and BatchNorm again."""
    blocks = {f"{name}.conv.weight": (name, m) for name, m in network.named_modules() if isinstance(m, RepConv)}
    unknown = [key for key, known in their_names([*blocks], rules).items() if known is None and key in weights]
    opened = dict(weights)
    for name, block in map(blocks.__getitem__, unknown):
        parts = _conv_and_norm(block, opened.pop(f"{name}.conv.weight"), opened.pop(f"{name}.conv.bias", None))
        if parts is None:
            raise ConfigurationError(
                f"the deploy form of {target} has no place for the collapsed {name}, which is more than a convolution "
                f"with a BatchNorm behind it; convert the weights of the train form, and collapse them by {target}"
            )
        opened |= {f"{name}.{key}": tensor for key, tensor in parts.items()}
    return opened


def _conv_and_norm(block: RepConv, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor] | None:
    """A collapsed block's weights in its train form, if that is a convolution with a BatchNorm behind it."""
    path, chain = _innermost(block.branches, "branches")
    children = dict(chain.named_children()) if isinstance(chain, nn.Sequential) else {}
    match [*children.values()]:
        case [nn.Conv2d(bias=None) as conv, nn.BatchNorm2d(affine=True, track_running_stats=True) as norm] if (
            conv.weight.shape == weight.shape
        ):
            assert bias is not None  # every BatchNorm shifts
            parts = ({"weight": weight}, _only_adding(bias, norm.eps))
            pairs = zip(children, parts, strict=True)
            return {f"{path}.{child}.{key}": tensor for child, part in pairs for key, tensor in part.items()}
        case _:
            return None


def _innermost(module: nn.Module, path: str) -> tuple[str, nn.Module]:
    """Where it is, and the first module inside that has not just one child."""
    children = list(module.named_children())
    return _innermost(children[0][1], f"{path}.{children[0][0]}") if len(children) == 1 else (path, module)


def _only_adding(bias: Tensor, eps: float) -> dict[str, Tensor]:
    """A BatchNorm that adds a bias and does nothing else: ``(1 - eps) + eps`` is rounded to 1."""
    return {
        "weight": torch.ones_like(bias),
        "bias": bias,
        "running_mean": torch.zeros_like(bias),
        "running_var": torch.ones_like(bias) - eps,
        "num_batches_tracked": torch.zeros((), dtype=torch.long, device=bias.device),
    }


def _shaped(tensor: Tensor, like: Tensor | None) -> Tensor:
    """The tensor in the shape of another where they differ in dims of size 1 only, as linear layers and 1x1s do."""
    if like is None or [n for n in tensor.shape if n > 1] != [n for n in like.shape if n > 1]:
        return tensor
    return tensor if tensor.shape == like.shape else tensor.reshape(like.shape)


def _check(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise unless the weights are exactly those of our model in one of its forms."""
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is unknown" for key in weights if key not in expected]
    problems += [
        f"{key} is {list(weights[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(
            f"these are not the weights of {what}: {some(problems)}; name the model that they belong to, and the "
            "arguments it is built with, such as num_classes=10"
        )


@functools.cache
def _outline(model: str) -> StagedNet:
    """A default network to read names from, not to be changed: building one takes about a second."""
    return _skeleton(model, "train", {})


def _skeleton(model: str, form: Form, model_args: Mapping[str, Any]) -> StagedNet:
    """Names and shapes without memory for the weights."""
    with torch.device("meta"):
        network = create_model(model, form=form, **model_args)
    if not isinstance(network, StagedNet):
        raise ConfigurationError(f"{model} is no model of the zoo; rb.list_models() gives their names")
    return network
