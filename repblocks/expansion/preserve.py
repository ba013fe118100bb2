"""Making a new block compute what a trained convolution and its BatchNorm compute."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # base of every BatchNorm

from repblocks.blocks import RepConv
from repblocks.blocks.base import folded
from repblocks.blocks.layers import Squeezed
from repblocks.calibration import batch_norms
from repblocks.expansion.expanded import Norm
from repblocks.expansion.fitting import bias_of, fitted
from repblocks.expansion.report import Preserved
from repblocks.fusion import AffineConv, Sum, ungroup
from repblocks.verification import TOLERANCES


class CannotExpandError(Exception):
    """A convolution stays as it is; the message is the reason in the report, not an error for users."""


@dataclass(frozen=True, eq=False, slots=True)
class Route:
    """A convolution inside a linear module, and what the data passes before and after it, outside of other branches."""

    main: nn.Conv2d
    before: tuple[nn.Module, ...] = ()
    after: tuple[nn.Module, ...] = ()


@torch.no_grad()
def preserve(block: RepConv, conv: nn.Conv2d, norm: Norm | None) -> Preserved:
    """Give a block in float64 the weights with which it computes ``norm(conv(x))``; in place.

    Where the block's branches end in BatchNorms, the convolution and its norm become the first branch that has their
    form, and the last norm of every other branch starts at 0. Where branches have no norm of their own, the kernel
    of their convolution takes back what they add.

    Args:
        block: In float64 on the CPU.
        conv: What it replaces, in float64 on the CPU.
        norm: Becomes the block's own norm, or stays behind the block where that has none; its running mean takes what
            the block adds to or leaves out of the convolution's bias.

    Returns:
        The modes in which the function stays the same.

    Raises:
        CannotExpandError: The block has no such form.
    """
    chain = _chain_with_norm(block, conv)
    if chain is None and batch_norms(block):
        raise CannotExpandError(f"no branch of {type(block).__name__} is a convolution and a BatchNorm at its end")
    if chain is None:
        return _take_over(block.branches, conv, norm)
    if norm is None:
        raise CannotExpandError(
            f"has no BatchNorm of its own behind it, and {type(block).__name__} would add one, which changes training; "
            'init="fresh" allows that where the convolution has a bias'
        )
    _silence(block, keep=chain)
    chain[-1] = norm
    return _take_over(chain[0] if len(chain) == 2 else chain[:-1], conv, norm)


def _branches(block: RepConv) -> list[nn.Module]:
    return list(block.branches.values()) if isinstance(block.branches, Sum) else [block.branches]


def _chain_with_norm(block: RepConv, conv: nn.Conv2d) -> nn.Sequential | None:
    """The first branch that ends in a BatchNorm and has a convolution of this kernel before it."""
    for branch in _branches(block):
        if isinstance(branch, nn.Sequential) and len(branch) > 1 and isinstance(branch[-1], _BatchNorm):
            routes = routes_in(branch[:-1], conv.kernel_size)
            if any(route.main.groups == conv.groups for route in routes):
                return branch
    return None


def _silence(block: RepConv, *, keep: nn.Module) -> None:
    """Start the last norm of every other branch at 0."""
    norms = {id(branch): _last_norm(branch) for branch in _branches(block) if branch is not keep}
    if None in norms.values():
        raise CannotExpandError(
            f"a branch of {type(block).__name__} does not end in a BatchNorm, and nothing before a BatchNorm can take "
            'back what it adds; use init="fresh"'
        )
    for norm in norms.values():
        assert norm is not None
        norm.weight.zero_()
        norm.bias.zero_()


def _last_norm(branch: nn.Module) -> _BatchNorm | None:
    last = branch[-1] if isinstance(branch, nn.Sequential) else branch
    return last if isinstance(last, _BatchNorm) and last.affine else None


def routes_in(module: nn.Module, kernel_size: tuple[int, ...]) -> Iterator[Route]:
    """The learned convolutions of a kernel size inside a linear module, in order."""
    if isinstance(module, nn.Conv2d):
        if module.kernel_size == kernel_size and isinstance(module.weight, nn.Parameter):
            yield Route(module)
    elif isinstance(module, nn.Sequential):
        parts = tuple(module)
        for i, part in enumerate(parts):
            for route in routes_in(part, kernel_size):
                yield Route(route.main, (*parts[:i], *route.before), (*route.after, *parts[i + 1 :]))
    elif isinstance(module, Sum | Squeezed | RepConv):
        inside = module.values() if isinstance(module, Sum) else [module.branches]
        for branch in inside:
            yield from routes_in(branch, kernel_size)


def _take_over(front: nn.Module, conv: nn.Conv2d, norm: Norm | None) -> Preserved:
    """Make what is in front of the norm compute the convolution."""
    if isinstance(front, nn.Conv2d):  # the same layer: it becomes the convolution, bias and all
        front.weight.copy_(conv.weight)
        front.bias = copy.deepcopy(conv.bias)
        return "train and eval"
    target = AffineConv.from_module(conv)
    absorbing = (route for route in routes_in(front, conv.kernel_size) if _absorb(front, route, target, norm))
    if next(absorbing, None) is None:
        raise CannotExpandError("no kernel inside the block can take over the convolution's")
    return "eval only" if batch_norms(front) else "train and eval"


def _absorb(front: nn.Module, route: Route, target: AffineConv, norm: Norm | None) -> bool:
    """Solve ``fold(front) == target`` for one convolution inside, or leave that as it was.

    ``fold(front)`` is affine in it: what the other branches add, plus its kernel between two maps over channels. The
    bias is its own to match, or a norm behind takes the difference.
    """
    if norm is not None:
        _pass_through(route.after, norm, target)
    kept = [parameter.clone() for parameter in route.main.parameters()]
    for parameter in route.main.parameters():
        parameter.zero_()
    rest = folded(front, target.in_channels).promote(2)
    lacking = bias_of(target) - bias_of(rest)
    solved = _solve_kernel(route, target, rest)
    if norm is not None:
        assert norm.running_mean is not None
        norm.running_mean -= lacking if solved else 0
    elif solved:
        solved = _solve_bias(route, target.groups, lacking)
    for parameter, old in zip(route.main.parameters(), kept, strict=True):
        parameter.copy_(parameter if solved else old)
    return solved


def _solve_kernel(route: Route, target: AffineConv, rest: AffineConv) -> bool:
    """Whether the convolution's kernel can make up what the rest lacks of the target; then it does."""
    main, groups = route.main, target.groups
    before, after = (_Maps.of(parts, groups) for parts in (route.before, route.after))
    if before is None or after is None or main.groups != groups:
        return False
    missing = (target.weight - fitted(rest, target)).flatten(2).unflatten(0, (groups, -1))  # [groups, out, in, taps]
    inner = after.preimage(missing)
    kernel = before.turned().preimage(inner.transpose(1, 2)).transpose(1, 2)
    main.weight.copy_(kernel.reshape(main.weight.shape))
    return _near(before.turned()(kernel.transpose(1, 2)), inner.transpose(1, 2)) and _near(after(inner), missing)


def _solve_bias(route: Route, groups: int, lacking: Tensor) -> bool:
    after = _Maps.of(route.after, groups)
    if route.main.bias is None or after is None:
        return not lacking.any()
    wanted = lacking.reshape(groups, -1, 1, 1)
    bias = after.preimage(wanted)
    route.main.bias.copy_(bias.flatten())
    return _near(after(bias), wanted)


def _near(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= TOLERANCES[torch.float64]["block"] * wanted.abs().max())


@dataclass(frozen=True, eq=False, slots=True)
class _Maps:
    """A chain of linear maps over channels: a matrix ``[out, in]`` for each group, None for no chain at all."""

    matrices: Tensor | None = None

    @classmethod
    def of(cls, parts: Sequence[nn.Module], groups: int) -> "_Maps | None":
        """The matrices of a chain that maps every pixel by itself, within groups; None of any other."""
        if not parts:
            return cls()
        value = folded(nn.Sequential(*parts)).promote(2)
        if not value.is_pointwise or value.groups % groups:
            return None
        return cls(ungroup(value, groups).weight.flatten(1).unflatten(0, (groups, -1)))

    def turned(self) -> "_Maps":
        """The transposed matrices."""
        return self if self.matrices is None else _Maps(self.matrices.mT)

    def __call__(self, channels: Tensor) -> Tensor:
        """Map ``[groups, in, ...]`` to ``[groups, out, ...]``."""
        if self.matrices is None:
            return channels
        return (self.matrices @ channels.flatten(2)).unflatten(2, channels.shape[2:])

    def preimage(self, image: Tensor) -> Tensor:
        """The smallest ``[groups, in, ...]`` mapped to ``image`` of ``[groups, out, ...]``, or next to it."""
        if self.matrices is None:
            return image
        diagonal = self.matrices.diagonal(dim1=1, dim2=2)
        if torch.equal(torch.diag_embed(diagonal), self.matrices):
            return image / diagonal[:, :, None, None]
        solution: Tensor = torch.linalg.lstsq(self.matrices, image.flatten(2)).solution
        return solution.unflatten(2, image.shape[2:])


def _pass_through(after: Sequence[nn.Module], norm: Norm, target: AffineConv) -> None:
    """Let a norm right behind the convolution expect the convolution's statistics, and not change what it reads."""
    if not after or not isinstance(after[0], _BatchNorm):
        return
    inner = after[0]
    assert inner.running_mean is not None
    assert inner.running_var is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    inner.running_mean.copy_(norm.running_mean - bias_of(target))
    inner.running_var.copy_(norm.running_var)
    inner.weight.copy_((inner.running_var + inner.eps).sqrt())
    inner.bias.copy_(inner.running_mean)
