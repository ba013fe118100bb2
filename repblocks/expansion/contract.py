"""`contract`: an expanded model becomes the architecture that it was, with the merged weights."""

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from repblocks.calibration import batch_norms
from repblocks.errors import ConfigurationError, FoldError
from repblocks.expansion.expand import substitute
from repblocks.expansion.expanded import ExpandedConv, ExpandedNorm, Norm
from repblocks.expansion.fitting import fitted
from repblocks.expansion.recipe import recipe_of
from repblocks.expansion.statistics import estimate_statistics
from repblocks.fusion import AffineConv
from repblocks.graph.copies import duplicate

Module = TypeVar("Module", bound=nn.Module)


def contract(model: nn.Module, batches: Iterable[Tensor] | None = None) -> nn.Module:
    """Undo `expand` in a copy: the original classes, names and shapes, with the weights that the blocks amount to.

    ``contract(m)(x) == m.eval()(x)`` in eval mode, and its ``state_dict`` loads with ``strict=True`` wherever the
    one from before the expansion did. Each kernel holds a whole block; the BatchNorm behind it keeps the shift only
    (mean 0, scale 1). To train on, give it statistics that fit its kernel by ``batches``.

    Args:
        model: An expanded model, or one that holds some; in train or in deploy form; not touched.
        batches: Inputs of the model. The running statistics of the norms become those over all their pixels, their
            weight and bias such that the model computes the same. Norms without weight and bias stay.

    Returns:
        The plain model, in the training mode of the given one.

    Raises:
        ConfigurationError: Nothing in the model was expanded, a part of an expanded pair is missing, or there are no
            batches.
        FoldError: A block does not amount to the convolution it stands for, or is not finite.
    """
    plain = duplicate(model)
    expanded = {name: m for name, m in plain.named_modules() if isinstance(m, ExpandedConv)}
    _require_pairs(plain, expanded)
    replaced: dict[int, nn.Module] = {}
    norms: list[tuple[nn.Module, Norm]] = []
    for name, module in expanded.items():
        conv, norm = _contracted(module, name)
        replaced[id(module)] = conv
        if norm is not None:
            replaced[id(module.original.place)] = norm
            norms.append((conv, norm))
    plain = substitute(plain, replaced)
    if batches is not None:
        estimate_statistics(plain, norms, batches)
    return plain


def contracted(model: nn.Module) -> nn.Module:
    """What a trained model is without its expansions; the model itself where there are none."""
    return contract(model) if recipe_of(model) else model


def _require_pairs(model: nn.Module, expanded: dict[str, ExpandedConv]) -> None:
    if not expanded:
        raise ConfigurationError(
            f"nothing in {type(model).__name__} was expanded, so there is nothing to contract; repblocks.expand makes "
            "what contract undoes, repblocks.deployed collapses other blocks"
        )
    present = {id(module): name for name, module in model.named_modules() if isinstance(module, ExpandedNorm)}
    for name, module in expanded.items():
        place = module.original.place
        if place is not None and present.pop(id(place), None) is None:
            raise ConfigurationError(
                f"the place of the BatchNorm that {name!r} took over is not in this model; contract the whole model "
                "that was expanded, or one that holds both"
            )
    if present:
        raise ConfigurationError(
            f"{', '.join(present.values())} had BatchNorms that blocks outside of this model took over; contract the "
            "whole model that was expanded, or one that holds both"
        )


def _contracted(module: ExpandedConv, name: str) -> tuple[nn.Conv2d, Norm | None]:
    original = module.original
    try:
        value = module.value()
        kernel = fitted(value, AffineConv.from_module(original.conv))
        shift = torch.zeros(len(kernel), dtype=torch.float64) if value.bias is None else value.bias
        conv = _made_real(original.conv, module).train(module.training)
        norm = None if original.norm is None else _made_real(original.norm, module)
        _fill(conv, kernel, shift if norm is None else torch.zeros_like(shift))
        if norm is not None:
            _refill(norm, shift, module)
    except FoldError as error:
        raise FoldError(f"{name or type(module).__name__} does not contract: {error}") from error
    return conv, norm


def _made_real(layer: Module, module: ExpandedConv) -> Module:
    """The layer where the block is now, in the dtype it would have been cast to along with it."""
    now, then = next(module.parameters()), module.original.conv.weight
    own = next(t for t in (*layer.buffers(), *layer.parameters()) if t.is_floating_point())
    dtype = own.dtype if now.dtype == then.dtype else now.dtype
    return copy.deepcopy(layer).to_empty(device=now.device).to(dtype)


@torch.no_grad()
def _fill(conv: nn.Conv2d, kernel: Tensor, shift: Tensor) -> None:
    conv.weight.copy_(kernel)
    if conv.bias is not None:
        conv.bias.copy_(shift)
    elif shift.any():
        raise FoldError("the block adds a bias, for which the original convolution has no place")
    _require_finite(conv)


@torch.no_grad()
def _refill(norm: Norm, shift: Tensor, module: ExpandedConv) -> None:
    """Make a norm add the shift only: mean 0, and a variance that with eps is 1."""
    original = module.original
    assert original.place is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    if norm.weight is not None:  # pyright: ignore[reportUnnecessaryComparison]  # None without affine parameters
        norm.weight.fill_(1)
    if norm.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
        norm.bias.copy_(shift)
    else:
        norm.running_mean.sub_(shift)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(_batches_seen(module))
    for name, child in original.place.named_children():
        setattr(norm, name, child)
    norm.training = original.place.training
    _require_finite(norm)


def _batches_seen(module: ExpandedConv) -> int:
    seen = [norm.num_batches_tracked for norm in batch_norms(module)]
    return max((int(count) for count in seen if count is not None), default=module.original.batches)


def _require_finite(layer: nn.Module) -> None:
    tensors = (*layer._parameters.values(), *layer._buffers.values())  # pyright: ignore[reportPrivateUsage]  # its own
    if not all(tensor.isfinite().all() for tensor in tensors if tensor is not None):
        raise FoldError("its weights are not finite; look for NaN or infinite weights and BatchNorm statistics")
