"""Renaming weights by pairs of patterns, in both directions."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repblocks.errors import CheckpointError, ConfigurationError

# Their key and ours, in both forms; each "*" stands for the same text on both sides, and the first match counts.
# Several of ours share one of theirs in equal parts along the channels, as a BatchNorm behind a concatenation does;
# an empty tuple stands for what their network holds and does not use.
Rules = Sequence[tuple[str, str | tuple[str, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """How one repository names the weights of a family.

    Attributes:
        rules: The rules for a network of ours, whose depths may matter.
        one_way: Why the weights only come to us, where they do: their shapes or their deploy form differ.
        deploy_rules: The rules of their deploy form, where it gives keys of the train form another meaning; only of
            ``one_way`` names.
    """

    rules: Callable[[nn.Module], Rules]
    one_way: str | None = None
    deploy_rules: Callable[[nn.Module], Rules] | None = None

    def rules_for(self, network: nn.Module, keys: Sequence[str]) -> Rules:
        """The rules of the form that has these keys: those that know the most of them."""
        forms = [self.rules] if self.deploy_rules is None else [self.rules, self.deploy_rules]
        return max((rules(network) for rules in forms), key=lambda rules: share_matched(keys, rules))


def ours_from_theirs(weights: Mapping[str, Tensor], rules: Rules, owner: str) -> dict[str, Tensor]:
    """Weights under our names; the tensors are shared.

    Raises:
        CheckpointError: A key matches no rule; ``owner`` says whose keys were expected.
    """
    found = our_names(list(weights), rules)
    _require_all({key: names is not None for key, names in found.items()}, owner)
    return {name: part for key, names in found.items() for name, part in _parts(weights[key], names or []).items()}


def our_names(keys: Sequence[str], rules: Rules) -> dict[str, list[str] | None]:
    """Our names for each of their keys; None where no rule matches."""
    patterns = [(_pattern(theirs), _several(ours)) for theirs, ours in rules]
    return {key: _ours(key, patterns) for key in keys}


def theirs_from_ours(weights: Mapping[str, Tensor], rules: Rules, owner: str) -> dict[str, Tensor]:
    """Weights under their names, the inverse of `ours_from_theirs`.

    Raises:
        CheckpointError: A key matches no rule.
    """
    found = their_names(list(weights), rules)
    _require_all({key: name is not None for key, name in found.items()}, owner)
    parts: dict[str, list[Tensor]] = {}
    for key, name in found.items():
        parts.setdefault(str(name), []).append(weights[key])
    return {name: _joined(tensors) for name, tensors in parts.items()}


def their_names(keys: Sequence[str], rules: Rules) -> dict[str, str | None]:
    """Their name for each of our keys; None where no rule matches."""
    pairs = [(_pattern(part), theirs) for theirs, ours in rules for part in _several(ours)]
    return {key: _first(key, pairs) for key in keys}


def share_matched(keys: Sequence[str], rules: Rules) -> float:
    """Which part of their keys the rules know, from 0 to 1."""
    patterns = [_pattern(theirs) for theirs, _ in rules]
    return sum(any(pattern.fullmatch(key) for pattern in patterns) for key in keys) / max(len(keys), 1)


def require_two_way(names: Names, source: str) -> None:
    """Refuse the way back where there is none.

    Raises:
        ConfigurationError: The names are ``one_way``.
    """
    if names.one_way is not None:
        raise ConfigurationError(f"weights are converted from {source} only, not to it: {names.one_way}")


def _several(ours: str | tuple[str, ...]) -> tuple[str, ...]:
    return ours if isinstance(ours, tuple) else (ours,)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\*", "(.+)"))


def _first(key: str, pairs: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, name in pairs:
        if match := pattern.fullmatch(key):
            return name.replace("*", "{}").format(*match.groups())
    return None


def _ours(key: str, patterns: Sequence[tuple[re.Pattern[str], tuple[str, ...]]]) -> list[str] | None:
    for pattern, names in patterns:
        if pattern.fullmatch(key):
            return [str(_first(key, [(pattern, name)])) for name in names]
    return None


def _parts(tensor: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    if len(names) < 2 or not tensor.ndim:
        return dict.fromkeys(names, tensor)
    return dict(zip(names, tensor.chunk(len(names)), strict=True))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 or not tensors[0].ndim else torch.cat(list(tensors))


def _require_all(known: Mapping[str, bool], owner: str) -> None:
    unknown = [key for key, is_known in known.items() if not is_known]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(known)} keys are not keys of {owner}: {some(unknown)}; give the state dict "
            f"itself (checkpoints often hold it under 'state_dict' or 'model'), and the model that it belongs to"
        )


def some(items: Sequence[str]) -> str:
    """The first three, and whether there are more."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
