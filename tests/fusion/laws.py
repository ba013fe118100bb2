"""The laws of the algebra as functions of a drawn case, with torch's own modules as the oracle."""

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repblocks import fusion
from repblocks.errors import FoldError
from repblocks.fusion import AffineConv
from repblocks.verification import TOLERANCES


def assert_same(expected: Tensor, got: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    tolerance = TOLERANCES[expected.dtype]["block"]
    assert (expected - got).abs().max() <= tolerance * expected.abs().max()


def run(conv: AffineConv, x: Tensor) -> Tensor:
    """What torch's padding and convolution modules make of the value's tensors and geometry."""
    if x.ndim == 2:
        return run(conv, x.unsqueeze(-1)).squeeze(-1)
    rank = x.ndim - 2
    weight = conv.weight.reshape(*conv.weight.shape, *(1,) * (rank - conv.rank))
    sides = [amount for pair in reversed(conv.padding) for amount in pair]
    if any(sides):
        x = F.pad(x, sides, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    shape = {"in_channels": weight.shape[1] * conv.groups, "out_channels": weight.shape[0], "groups": conv.groups}
    geometry = {"stride": conv.stride or 1, "dilation": conv.dilation or 1, "bias": conv.bias is not None}
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](**shape, kernel_size=weight.shape[2:], **geometry)
    module.load_state_dict({"weight": weight} | ({} if conv.bias is None else {"bias": conv.bias}), assign=True)
    with torch.no_grad():
        return module(x)


def run_chain(convs: tuple[AffineConv, ...], x: Tensor) -> Tensor:
    for conv in convs:
        x = run(conv, x)
    return x


def assert_value_is(conv: AffineConv, x: Tensor, expected: Tensor) -> None:
    """The value gives ``expected`` by itself, by the oracle, and as a plain module."""
    assert_same(expected, conv(x))
    assert_same(expected, run(conv, x))
    if conv.rank or x.ndim == 2:
        with torch.no_grad():
            assert_same(expected, conv.to_module()(x))


def compose_is_the_chain(case) -> None:
    (first, second), x = case
    assert_value_is(fusion.compose(first, second), x, run_chain((first, second), x))


def compose_is_exact_or_refuses(case) -> None:
    with contextlib.suppress(FoldError):
        compose_is_the_chain(case)


def add_is_the_sum(case) -> None:
    convs, x = case
    assert_value_is(fusion.add(*convs), x, sum(run(conv, x) for conv in convs))


def concat_is_the_concatenation(case) -> None:
    convs, x = case
    assert_value_is(fusion.concat(*convs), x, torch.cat([run(conv, x) for conv in convs], dim=1))


def interleave_alternates_the_channels(case) -> None:
    convs, x = case
    merged = fusion.interleave(*convs)
    assert merged.groups == math.gcd(*(conv.groups for conv in convs))
    assert_value_is(merged, x, torch.stack([run(conv, x) for conv in convs], dim=2).flatten(1, 2))


def split_concat_reads_slices(case) -> None:
    convs, x = case
    slices = x.split([conv.in_channels for conv in convs], dim=1)
    expected = torch.cat([run(conv, part) for conv, part in zip(convs, slices, strict=True)], dim=1)
    assert_value_is(fusion.split_concat(*convs), x, expected)


def pad_kernel_changes_nothing(case) -> None:
    conv, kernel_size, x = case
    grown = fusion.pad_kernel(conv, kernel_size)
    assert grown.kernel_size == kernel_size
    assert_value_is(grown, x, run(conv, x))


def ungroup_changes_nothing(case) -> None:
    conv, groups, x = case
    dense = fusion.ungroup(conv, groups)
    assert dense.groups == groups
    assert_value_is(dense, x, run(conv, x))


def identity_is_the_unit(case) -> None:
    conv, x = case
    expected = run(conv, x)
    assert_value_is(fusion.compose(fusion.identity(conv.in_channels), conv), x, expected)
    assert_value_is(fusion.compose(conv, fusion.identity(conv.out_channels)), x, expected)


def dirac_changes_nothing(case) -> None:
    kernel_size, groups, x = case
    assert_value_is(fusion.dirac(x.shape[1], kernel_size, groups, dtype=x.dtype), x, x)


def the_shortcut_is_absorbed(case) -> None:
    convs, activations, x = case
    absorbed = fusion.absorb_shortcut(convs, activations)
    shortcut = _activated_chain([lambda y: y] * len(convs), activations, x)
    expected = _activated_chain([_runner(conv) for conv in convs], activations, x) + shortcut
    assert_same(expected, _activated_chain([_runner(conv) for conv in absorbed], activations, x))


def _runner(conv: AffineConv) -> Callable[[Tensor], Tensor]:
    return lambda x: run(conv, x)


def _activated_chain(steps, activations, x: Tensor) -> Tensor:
    with torch.no_grad():
        for step, activation in zip(steps, (*activations, nn.Identity()), strict=True):
            x = activation(step(x))
    return x
