"""Choosing how a model's blocks run in training mode, and reading what they chose."""

import copy
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor, nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.copying import copied, on_meta
from repblocks.blocks.merged.choice import Choice, Execution, Method, choice_for
from repblocks.names import known_name
from repblocks.profiling import first_parameter_options


@dataclass(frozen=True, slots=True)
class BlockExecution:
    """One row of an `ExecutionPlan`.

    Attributes:
        name: Of the block in the model.
        block: Its class.
        input_size: ``(batch, channels, height, width)`` that it sees.
        method: "separate", "folded", "patches" or "outputs"; see `set_execution`.
        reason: Why: estimated milliseconds of each method on one core, and what a method that is missing lacks.
    """

    name: str
    block: str
    input_size: tuple[int, ...]
    method: Method
    reason: str


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """What each block of a model runs in training mode; ``str()`` makes a table."""

    blocks: tuple[BlockExecution, ...]

    def __str__(self) -> str:
        rows = [("block", "class", "input", "runs", "why")]
        rows += [(b.name, b.block, "x".join(map(str, b.input_size)), b.method, b.reason) for b in self.blocks]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
        )


def set_execution(model: nn.Module, execution: Execution) -> None:
    """Choose how every `RepConv` of a model runs its branches in training mode. Nothing else changes.

    Outputs, gradients and running statistics are those of the separate branches up to rounding, whichever way runs;
    parameters and ``state_dict`` stay as they are. Eval mode always runs the branches. Gradients of gradients, as for
    gradient penalties, need "separate".

    Args:
        model: Whose blocks are set, those inside others too.
        execution: "auto" estimates what is fastest for each block and input size, by a rule that does not measure, so
            that runs repeat; "separate" runs the branches; "merged" never does where a merged way exists: the
            faster of "patches" (the norms' statistics follow from the moments of the input patches, and one
            convolution runs for all branches) and "outputs" (the branches convolve, their norms and sums become one
            affine combination), which can be asked for by name too. A block that a way does not suit runs separately;
            `execution_plan` says why.

    Raises:
        ConfigurationError: An unknown choice.
    """
    chosen = known_name("execution", execution, get_args(Execution))
    for block in _blocks(model).values():
        block.execution = cast("Execution", chosen)


def execution_plan(model: nn.Module, input_size: tuple[int, int, int], batch_size: int = 32) -> ExecutionPlan:
    """What each block runs in training mode on a batch of this size. The model is not touched and does not run.

    Where operations are followed from outside (``torch.compile``, functorch, forward-mode differentiation), the
    branches run separately whatever the plan says: the compiler fuses them itself.

    Args:
        model: In training mode it is taken as it is, frozen norms too; a model in eval mode as ``train()`` makes it.
        input_size: ``(channels, height, width)`` of an image.
        batch_size: Images in a batch, on one process.
    """
    trained = model if model.training else copy.deepcopy(model).train()
    inputs = _inputs(trained, (batch_size, *input_size))
    chosen = [(name, block, inputs[name]) for name, block in _blocks(trained).items() if name in inputs]
    return ExecutionPlan(tuple(_row(name, block, x) for name, block, x in chosen))


def _row(name: str, block: RepConv, x: Tensor) -> BlockExecution:
    choice = Choice("separate", "set so") if block.execution == "separate" else choice_for(block, x)
    return BlockExecution(name, type(block).__name__, tuple(x.shape), choice.method, choice.reason)


def _blocks(model: nn.Module) -> dict[str, RepConv]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, RepConv)}
    return {name: block for name, block in found.items() if block.form == "train"}


def _inputs(model: nn.Module, size: tuple[int, ...]) -> dict[str, Tensor]:
    """A tensor like the one that each block sees, without memory of its own."""
    shadow = copied(model, on_meta)
    for module in shadow.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):  # pyright: ignore[reportPrivateUsage]
            hooks.clear()
    seen: dict[str, Tensor] = {}
    like = torch.empty(1, **first_parameter_options(model))
    with _watched(shadow, seen):
        set_execution(shadow, "separate")
        shadow(torch.empty(size, dtype=like.dtype, device="meta"))
    return {
        name: like.new_empty(1, dtype=x.dtype).expand(x.shape).requires_grad_(x.requires_grad)
        for name, x in seen.items()
    }


@contextmanager
def _watched(model: nn.Module, seen: dict[str, Tensor]) -> Generator[None]:
    def watch(name: str, block: RepConv) -> torch.utils.hooks.RemovableHandle:
        return block.register_forward_pre_hook(lambda _, args: seen.update({name: args[0]}))

    handles = [watch(name, block) for name, block in _blocks(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
