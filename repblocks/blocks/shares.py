"""How much of a block's kernel each of its branches makes up."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.layers import Squeezed
from repblocks.fusion import SplitConcat, fold
from repblocks.fusion.containers import Branches
from repblocks.fusion.transposed import AnyConv


def branch_shares(block: RepConv) -> dict[str, float]:
    """Each parallel branch's share of the folded kernel: ``|W_b| / (|W_1| + ... + |W_n|)``, in Frobenius norms.

    ``W_b`` is the kernel that the block folds to while all other branches give zeros. So what surrounds the branches,
    such as a BatchNorm behind their sum, counts for each of them, and the ``W_b`` add up to the block's kernel. Biases
    do not count. Branches inside a branch belong to it.

    Args:
        block: In any mode; it is not changed. Eval mode's function counts, folded in float64 on the CPU.

    Returns:
        Share by the branch's name, adding up to 1; all 0 if every branch is. A block without parallel branches (a
        chain, or the deploy form) has one share of 1.0, under the name of its child.

    Raises:
        FoldError: A branch does not fold.
    """
    norms = {name: kernel.norm().item() for name, kernel in branch_kernels(block).items()}
    total = sum(norms.values())
    if len(norms) == 1:
        return dict.fromkeys(norms, 1.0)
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


def branch_kernels(block: RepConv) -> dict[str, Tensor]:
    """What each parallel branch adds to the folded kernel: ``W_b`` of `branch_shares`, all of one shape.

    Args:
        block: As in `branch_shares`.

    Returns:
        ``[O, I / groups, *kernel_size]`` in float64 on the CPU by the branch's name, named as in `branch_shares`; the
        sum is the kernel that the block folds to.

    Raises:
        FoldError: A branch does not fold.
    """
    name = "conv" if block.form == "deploy" else "branches"
    top = copy.deepcopy(getattr(block, name)).cpu().double().eval()
    found = _parallel(top, block.in_channels)
    if found is None:
        return {name: fold(top, block.in_channels).weight.detach()}
    container, _ = found
    kernels = dict(zip(container, _kernels(*found), strict=True))
    added: dict[str, Tensor] = {}
    for branch in kernels:
        _leave_one(container, kernels, branch)
        added[branch] = fold(top, block.in_channels).weight.detach()
    return added


def has_parallel_branches(block: RepConv) -> bool:
    """Whether there are two branches or more, whose shares say something."""
    found = _parallel(block.branches, block.in_channels) if block.form == "train" else None
    return found is not None and len(found[0]) > 1


def _parallel(module: nn.Module, in_channels: int) -> tuple[Branches, int] | None:
    """The first parallel branches along a chain, with the channels that they read."""
    if not any(isinstance(part, Branches) for part in module.modules()):
        return None
    if isinstance(module, Branches):
        return module, in_channels
    if isinstance(module, nn.Sequential):
        return _parallel_in_chain(module, in_channels)
    if isinstance(module, RepConv | Squeezed):
        return _parallel(module.branches, in_channels)
    return None


def _parallel_in_chain(chain: Iterable[nn.Module], in_channels: int) -> tuple[Branches, int] | None:
    for link in chain:
        found = _parallel(link, in_channels)
        if found is not None:
            return found
        in_channels = fold(link, in_channels).out_channels
    return None


def _kernels(container: Branches, in_channels: int) -> list[AnyConv]:
    """The branches, of two spatial dims."""
    widths = container.widths if isinstance(container, SplitConcat) else (in_channels,) * len(container)
    values = [fold.constant(branch, width) for branch, width in zip(container.values(), widths, strict=True)]
    return [value.promote(2) for value in values]


def _leave_one(container: Branches, kernels: Mapping[str, AnyConv], name: str) -> None:
    """Put plain convolutions in the places of the branches, all of zeros but one."""
    for other, value in kernels.items():
        weight = value.weight if other == name else torch.zeros_like(value.weight)
        container[other] = replace(value, weight=weight).to_module()
