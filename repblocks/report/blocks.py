"""The blocks of a model, one by one: what is in them, what they fold to, and what that costs and saves."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from repblocks.blocks.base import RepBlock, RepConv, deployed
from repblocks.blocks.shares import branch_shares
from repblocks.conformance import FormError, border_of, form_error
from repblocks.fusion import AffineConv, fold
from repblocks.profiling import latency_ms, profile
from repblocks.progress import Track, untracked
from repblocks.report.anatomy import Anatomy, anatomy
from repblocks.report.kernels import KernelFacts, in_words, kernel_facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one form costs for one image: learned numbers, multiply-accumulates, median milliseconds on one thread."""

    params: int
    macs: int
    latency_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFacts:
    """One block that has branches, and what takes their place.

    Attributes:
        name: Its place in the model; its class where it is the model.
        kind: Its class.
        anatomy: Its branches, layer by layer.
        shares: Each branch's share of the folded kernel, by name; empty for blocks that are more than one convolution.
        result: The convolutions of its deploy form, in words.
        error: The deploy form's error at the border and inside, in float32.
        padding_effect: By how much the border changes where it is padded by the nearest pixel instead of zeros,
            relative to the largest output; None without zero padding.
        train, deploy: Costs of both forms.
        kernels: The convolutions of its deploy form.
    """

    name: str
    kind: str
    anatomy: Anatomy
    shares: Mapping[str, float]
    result: tuple[str, ...]
    error: FormError
    padding_effect: float | None
    train: Cost
    deploy: Cost
    kernels: tuple[KernelFacts, ...]


def measure_blocks(
    model: nn.Module, images: Tensor, *, repeats: int = 10, track: Track = untracked
) -> list[BlockFacts]:
    """Every block in train form, in the model's order; those that a forward pass does not reach are left out.

    Args:
        model: In eval mode, on the CPU; it is not changed.
        images: Float32 ``[N, C, H, W]``; each block is measured on what it reads when the model sees them.
        repeats: Rounds of measuring each block's latency.
        track: Shows how far it is.

    Raises:
        FoldError: A block does not fold.
    """
    blocks = list(blocks_in_train_form(model))
    read = _inputs({name: block for name, block, _ in blocks}, model, images)
    reached = track([entry for entry in blocks if entry[0] in read], "measuring blocks")
    return [_measure(name, block, new, read[name], repeats) for name, block, new in reached]


def blocks_in_train_form(module: nn.Module, name: str = "") -> Iterator[tuple[str, RepBlock, dict[str, nn.Module]]]:
    """Every block that something takes the place of, and what, by name; not those inside of what is replaced."""
    children = module.deploy_children() if isinstance(module, RepBlock) and module.form == "train" else {}
    if isinstance(module, RepBlock) and children:
        yield name, module, {child: new for child, new in children.items() if new is not None}
    for child_name, child in module.named_children():
        if child_name not in children:
            yield from blocks_in_train_form(child, f"{name}.{child_name}".lstrip("."))


def deployed_kernels(model: nn.Module) -> list[KernelFacts]:
    """The convolutions of a model that has no train form any more."""
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return [kernel_facts(name or "Conv2d", AffineConv.from_module(conv)) for name, conv in convs.items()]


def _inputs(blocks: Mapping[str, nn.Module], model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each block reads when the model sees the images; the first time, if several."""
    read: dict[str, Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, block in blocks.items():
            hooks.callback(block.register_forward_pre_hook(_remembering(read, name)).remove)
        model(images)
    return read


def _remembering(read: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            read.setdefault(name, args[0].clone())  # a copy: what follows may work in place

    return hook


def _measure(name: str, block: RepBlock, new: Mapping[str, nn.Module], x: Tensor, repeats: int) -> BlockFacts:
    values = folded(block, new)
    plain = deployed(block)
    times = latency_ms({"train": block, "deploy": plain}, x[:1], repeats=repeats, warmup=2)
    return BlockFacts(
        name=name or type(block).__name__,
        kind=type(block).__name__,
        anatomy=anatomy(block),
        shares=branch_shares(block) if isinstance(block, RepConv) else {},
        result=tuple(in_words(value) for value in values.values()),
        error=form_error(copy.deepcopy(block).double(), x.double(), torch.float32),
        padding_effect=_padding_effect(block, values, x) if isinstance(block, RepConv) else None,
        train=_cost(block, x, times["train"]),
        deploy=_cost(plain, x, times["deploy"]),
        kernels=tuple(
            kernel_facts(_place(name or type(block).__name__, child, new), value) for child, value in values.items()
        ),
    )


def folded(block: RepBlock, new: Mapping[str, nn.Module]) -> dict[str, AffineConv]:
    """The convolutions that take the place of what `blocks_in_train_form` names, in the plane."""
    channels = block.in_channels if isinstance(block, RepConv) else None
    return {child: fold(module, channels).promote(2) for child, module in new.items()}


def _place(name: str, child: str, new: Mapping[str, nn.Module]) -> str:
    return name if len(new) == 1 else f"{name}.{child}"


def _cost(form: nn.Module, x: Tensor, latency: float) -> Cost:
    counted = profile(form, tuple(x.shape[1:]))
    return Cost(params=counted.params, macs=counted.macs, latency_ms=latency)


@torch.no_grad()
def _padding_effect(block: RepConv, values: Mapping[str, AffineConv], x: Tensor) -> float | None:
    """The folded block with another padding: how much of what the border says is said by zeros."""
    value = values["conv"]
    if value.padding_mode != "zeros" or not any(map(any, value.padding)):
        return None
    expected = value(x.to(value.weight.dtype))
    change = (replace(value, padding_mode="replicate")(x.to(value.weight.dtype)) - expected).abs()
    scale = expected.abs().max().item()
    at_border = change.where(border_of(block, tuple(x.shape[-2:]), expected), 0.0).max().item()
    return at_border / scale if scale else None
