"""What a module is, apart from its numbers: on the meta device, all that folding can depend on."""

from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass
from itertools import chain
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
    comparable = all(type(tensor) in (Tensor, nn.Parameter) and tensor.is_meta for tensor in _tensors(module))
    if not comparable or next(_tensors(module), None) is None:
        return None
    try:
        return _structure(module)
    except _NotPlain:
        return None


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


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
