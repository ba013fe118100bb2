"""What a module is, apart from its numbers: on the meta device, all that folding can depend on."""

from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (int, float, str, bytes, type(None), type, torch.dtype, torch.device)
_TENSORS = frozenset({"_parameters", "_buffers"})


def meta_structure(module: nn.Module) -> Hashable | None:
    """A key that modules on the meta device share only where they are built alike, down to every attribute.

    None where it is not known that they are: tensors elsewhere, or none at all, hooks, attributes that are not plain
    data.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if not tensors or not all(type(t) in (Tensor, nn.Parameter) and t.is_meta for t in tensors):
        return None
    try:
        return _structure(module)
    except _NotPlain:
        return None


class _NotPlain(Exception):
    """An attribute may hold anything."""


def _structure(module: nn.Module) -> Hashable:
    facts: list[Hashable] = [type(module)]
    for name, value in vars(module).items():
        if name in _TENSORS:
            facts += [(key, None if t is None else (t.shape, t.dtype, t.requires_grad)) for key, t in value.items()]
        elif name == "_modules":
            facts += [(key, None if child is None else _structure(child)) for key, child in value.items()]
        elif not (name.startswith("_") and isinstance(value, dict | set) and not value):  # no hooks
            facts.append((name, _plain(value)))
    return tuple(facts)


def _plain(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if is_dataclass(value):
        return type(value), *(_plain(getattr(value, field.name)) for field in fields(value))
    raise _NotPlain
