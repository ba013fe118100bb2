"""Which way a block runs in training mode: the choice for each input, made by rule and remembered."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore  # no public reader
from torch.nn.utils.parametrize import is_parametrized

from repblocks.blocks.merged import reading
from repblocks.blocks.merged.cost import separate_cost
from repblocks.blocks.merged.plans import FoldedPlan, MergedPlan, OutputsPlan, PatchesPlan, Plan, Unmergeable
from repblocks.blocks.merged.statistics import group_of
from repblocks.fusion.faithful import has_forward_hooks

Execution = Literal["auto", "separate", "merged", "patches", "outputs"]
Method = Literal["separate", "folded", "patches", "outputs"]


MEMORY_ADVANTAGE = 1.1
"""How much slower than the separate branches a merged way may be, which keeps less for the backward pass."""


class Block(Protocol):
    """What is needed of a block."""

    branches: nn.Module
    in_channels: int
    execution: Execution


@dataclass(frozen=True, slots=True)
class Choice:
    """How a block runs on one kind of input.

    Attributes:
        method: "separate": the branches as they are; "folded": one convolution, where all norms are frozen; "patches":
            one convolution, norms from the moments of its input; "outputs": the branches' norms in one combination.
        reason: Why, for people.
        plan: What runs; None for the branches.
    """

    method: Method
    reason: str
    plan: Plan | None = None


class _Choices(dict[object, Choice]):
    """What a block has chosen so far; copies and pickles of the block start anew."""

    def __deepcopy__(self, memo: object) -> "_Choices":
        return _Choices()

    def __reduce__(self) -> tuple[type["_Choices"], tuple[()]]:
        return _Choices, ()


def run(block: Block, x: Tensor) -> Tensor:
    """The branches in training mode: ``run(block, x) == block.branches(x)``, whichever way is chosen."""
    plan = None if block.execution == "separate" or _is_traced(x) else choice_for(block, x).plan
    return block.branches(x) if plan is None else plan.run(x)


def _is_traced(x: Tensor) -> bool:
    """Whether someone follows the operations, who needs those of the branches: compilers, functorch, forward mode."""
    return (
        torch.compiler.is_compiling()
        or not isinstance(x, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]  # a proxy of torch.fx
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or torch._C._functorch.maybe_current_level() is not None  # pyright: ignore  # no public reader
        or torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    )


def choice_for(block: Block, x: Tensor) -> Choice:
    """How a block runs on inputs like x."""
    known: _Choices = vars(block).setdefault("_choices", _Choices())
    autocast = torch.is_autocast_enabled(x.device.type)
    situation = (autocast, bool(_has_any_global_hook()), dist.is_available() and dist.is_initialized())
    of_input = (tuple(x.shape), x.dtype, x.device.type, x.requires_grad)
    key = (block.execution, *of_input, *situation, *_state(block.branches))
    choice = known.get(key)
    if choice is None:
        if len(known) > 16:  # sizes that come and go
            known.clear()
        with torch.no_grad():  # nothing of the planning is for the backward pass
            choice = known[key] = _choose(block, x, autocast=autocast)
    return choice


def _state(branches: nn.Module) -> Iterator[object]:
    """What the choice depends on besides the input: the modules, which of them train, what stands for their forward."""
    for module in branches.modules():
        yield module
        yield module.training
        own = vars(module)
        yield has_hooks(module) or "forward" in own
        yield own.get("stride"), own.get("padding"), own.get("dilation")


def _choose(block: Block, x: Tensor, *, autocast: bool) -> Choice:
    obstacle = _obstacle(block.branches, x, autocast=autocast)
    if obstacle is not None:
        return Choice("separate", obstacle)
    if not reading.holds_batch_norms(block.branches):
        return _folded(block)
    plans, refusals = _plans(block, x)
    refused = "; ".join(f"no {name}: {why}" for name, why in refusals.items())
    synchronises = any(group_of(module) is not None for module in block.branches.modules())
    batch = x[:1].expand(32, *x.shape[1:]) if synchronises else x  # all processes have to choose alike
    costs: dict[Method, float] = {"separate": separate_cost(block.branches, batch)}
    costs |= {name: plan.cost(batch) for name, plan in plans.items()}
    wanted = _allowed(block.execution, costs, must_synchronise=synchronises and x.device.type == "cpu")
    best: Method = min(wanted, key=lambda name: _weighed(name, wanted[name])) if wanted else "separate"
    estimates = ", ".join(f"{name} {cost / 1e6:.2f}" for name, cost in costs.items())
    return Choice(best, f"estimated ms: {estimates}" + (f"; {refused}" if refused else ""), plans.get(best))


def _weighed(name: Method, cost: float) -> float:
    return MEMORY_ADVANTAGE * cost if name == "separate" else cost


def _allowed(execution: Execution, costs: dict[Method, float], *, must_synchronise: bool) -> dict[Method, float]:
    """The methods that the setting leaves; torch's own SyncBatchNorm refuses tensors on the CPU."""
    merged: dict[Method, float] = {name: cost for name, cost in costs.items() if name != "separate"}
    if execution == "auto":
        return merged if must_synchronise and merged else dict(costs)
    return {name: cost for name, cost in merged.items() if execution in ("merged", name)}


def _folded(block: Block) -> Choice:
    try:
        return Choice("folded", "no norm follows the batch", FoldedPlan(block.branches, block.in_channels))
    except Unmergeable as refusal:
        return Choice("separate", f"no norm follows the batch; not folded: {refusal}")


def _plans(block: Block, x: Tensor) -> tuple[dict[Method, MergedPlan], dict[Method, str]]:
    """The plans that suit a block and an input, and why the others do not."""
    node = reading.read(block.branches)
    makers: dict[Method, Callable[[], MergedPlan]] = {
        "patches": lambda: PatchesPlan(node, block.in_channels, x),
        "outputs": lambda: OutputsPlan(node, block.in_channels),
    }
    plans: dict[Method, MergedPlan] = {}
    refusals: dict[Method, str] = {}
    for name, make in makers.items():
        try:
            plans[name] = make()
        except Unmergeable as refusal:
            refusals[name] = str(refusal)
    return plans, refusals


def _obstacle(branches: nn.Module, x: Tensor, *, autocast: bool) -> str | None:
    """What stands in the way of any merged execution."""
    modules = list(branches.modules())
    if any(map(has_hooks, modules)) or _has_any_global_hook():
        return "modules inside carry hooks, which have to see them run"
    if any(is_parametrized(module) for module in modules):
        return "weights are parametrized, calculated anew in each forward pass"
    kinds = {p.dtype for p in branches.parameters()} | (set() if autocast else {x.dtype})
    if not kinds <= {torch.float32} and not kinds <= {torch.float64}:
        return f"statistics need parameters and input in float32 or float64, got {', '.join(sorted(map(str, kinds)))}"
    if x.ndim != 4 or not x.numel():
        return f"the input is no batch of maps: {tuple(x.shape)}"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks want to see a module run, forward or backward."""
    return has_forward_hooks(module) or bool(module._backward_hooks or module._backward_pre_hooks)  # pyright: ignore[reportPrivateUsage]  # no public reader
