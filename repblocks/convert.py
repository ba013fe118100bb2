"""Other libraries' weights, renamed into ours and back."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repblocks.blocks.base import Form
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.models import RepVGG, create_model

OURS = "repblocks"

# Their key and ours, in both forms; each "*" stands for the same text on both sides, and the first match counts.
Rules = tuple[tuple[str, str], ...]

RULES: dict[str, dict[type[nn.Module], Rules]] = {
    "timm": {
        RepVGG: (
            ("*.conv_kxk.conv.*", "*.conv.branches.kxk.0.*"),
            ("*.conv_kxk.bn.*", "*.conv.branches.kxk.1.*"),
            ("*.conv_1x1.conv.*", "*.conv.branches.pointwise.0.*"),
            ("*.conv_1x1.bn.*", "*.conv.branches.pointwise.1.*"),
            ("*.identity.*", "*.conv.branches.identity.*"),
            ("*.reparam_conv.*", "*.conv.conv.*"),
            ("*.attn.*", "*.se.*"),
            ("head.fc.*", "head.fc.*"),
        ),
    },
}


def convert(
    state_dict: Mapping[str, Tensor], *, model: str, source: str = "timm", target: str = OURS, **model_args: Any
) -> dict[str, Tensor]:
    """Rename another library's weights for our model, or ours for another library; the tensors are shared.

    The form stays: weights of a training form give a training form, collapsed ones a deploy form.

    Args:
        state_dict: Weights by name, as ``module.state_dict()`` gives them.
        model: Our name of the model, such as ``rb_repvgg_a0``.
        source: Where the names come from: ``timm``, or ``repblocks`` together with a ``target``.
        target: Whose names to give: ``repblocks``, or another library's.
        model_args: What our model is built with where it is not the default, such as ``num_classes=10``.

    Raises:
        ConfigurationError: An unknown model, source or target, or no rules for this model.
        CheckpointError: Names that the rules do not know, missing weights, or shapes that are not the model's.
    """
    rules = _rules(type(_skeleton(model, "train", model_args)), source, target)
    if source == OURS:
        _check(state_dict, model, model_args)
        return _rename(state_dict, [(ours, theirs) for theirs, ours in rules], f"{model} of {OURS}")
    renamed = _rename(state_dict, rules, f"{source}'s counterpart of {model}")
    _check(renamed, model, model_args)
    return renamed


def _rules(family: type[nn.Module], source: str, target: str) -> Rules:
    if (source == OURS) == (target == OURS):
        raise ConfigurationError(
            f"cannot convert from {source!r} to {target!r}: one of them, and only one, is {OURS!r}"
        )
    other = target if source == OURS else source
    if other not in RULES:
        raise ConfigurationError(f"cannot convert from or to {other!r}; there are rules for {', '.join(RULES)}")
    if family not in RULES[other]:
        known = ", ".join(known.__name__ for known in RULES[other])
        raise ConfigurationError(f"there are no rules between {other} and {family.__name__}, only for {known}")
    return RULES[other][family]


def _rename(state_dict: Mapping[str, Tensor], rules: Iterable[tuple[str, str]], owner: str) -> dict[str, Tensor]:
    patterns = [(re.compile(re.escape(old).replace(r"\*", "(.+)")), new.replace("*", "{}")) for old, new in rules]
    names = {key: _renamed(key, patterns) for key in state_dict}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(state_dict)} keys are not keys of {owner}: {_some(unknown)}; give the state dict "
            f"itself (checkpoints often hold it under 'state_dict' or 'model'), and the model that it belongs to"
        )
    return {name: state_dict[key] for key, name in names.items() if name is not None}


def _renamed(key: str, patterns: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in patterns:
        if match := pattern.fullmatch(key):
            return template.format(*match.groups())
    return None


def _check(state_dict: Mapping[str, Tensor], model: str, model_args: Mapping[str, Any]) -> None:
    """Raise unless the weights are exactly those of our model in one of its forms."""
    form = "train" if any(".branches." in key for key in state_dict) else "deploy"
    expected = _skeleton(model, form, model_args).state_dict()
    problems = [f"{key} is missing" for key in expected if key not in state_dict]
    problems += [f"{key} is unknown" for key in state_dict if key not in expected]
    problems += [
        f"{key} is {list(state_dict[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(
            f"these are not the weights of {model} in {form} form with {dict(model_args)}: {_some(problems)}; name the "
            f"model that they belong to, and the arguments it is built with, such as num_classes=10"
        )


def _skeleton(model: str, form: Form, model_args: Mapping[str, Any]) -> nn.Module:
    """Names and shapes without memory for the weights."""
    with torch.device("meta"):
        return create_model(model, form=form, **model_args)


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
