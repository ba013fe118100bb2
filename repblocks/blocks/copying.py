"""Copies of modules in another place: without numbers, or in float64 on the CPU."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def copied(module: nn.Module, place: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy whose parameters and buffers are ``place``'d instead of copied."""
    memo: dict[int, object] = {id(p): nn.Parameter(place(p.detach()), p.requires_grad) for p in module.parameters()}
    memo |= {id(b): place(b) for b in module.buffers()}
    memo |= {id(t): place(t.detach()) for t in calculated_attributes(module)}
    return copy.deepcopy(module, memo)


def calculated_attributes(model: nn.Module) -> list[Tensor]:
    """Tensors among the attributes of the modules that are neither parameters nor buffers, and have a history."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    return [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]


def on_meta(tensor: Tensor) -> Tensor:
    """The tensor without its numbers."""
    return tensor.detach().to("meta")


def in_float64(tensor: Tensor) -> Tensor:
    """Real numbers in float64 on the CPU; on the meta device they stay there, and integers integers."""
    device = tensor.device if tensor.device.type == "meta" else "cpu"
    return tensor.to(device, torch.float64 if tensor.is_floating_point() else tensor.dtype)
