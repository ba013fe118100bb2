"""The arithmetic of ordinary convolutions, exact or FoldError; `verbs` says what each function promises."""

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from repblocks.errors import FoldError
from repblocks.fusion.affine_conv import AffineConv, PaddingMode, grow
from repblocks.fusion.alignment import Window, require_same, unified
from repblocks.fusion.geometry import Pair, insert_zeros


def add(*convs: AffineConv) -> AffineConv:
    """`verbs.add` of ordinary convolutions."""
    branches = _over_one_input("add", convs)
    require_same("add", branches, "out_channels", lambda conv: conv.out_channels)
    present = [conv.bias for conv in branches if conv.bias is not None]
    bias = functools.reduce(torch.add, present) if present else None
    window, groups = Window.over("add", branches), _common_groups(branches)
    return window.conv(window.kernel(branches, groups), bias, groups)


def concat(*convs: AffineConv) -> AffineConv:
    """`verbs.concat` of ordinary convolutions."""
    branches = [ungroup(conv, 1) for conv in _aligned("concat", convs)]
    return replace(branches[0], weight=torch.cat([conv.weight for conv in branches]), bias=_joined_bias(branches))


def interleave(*convs: AffineConv) -> AffineConv:
    """`verbs.interleave` of ordinary convolutions."""
    branches = _aligned("interleave", convs)
    require_same("interleave", branches, "out_channels", lambda conv: conv.out_channels)
    weight = torch.stack([conv.weight for conv in branches], dim=1).flatten(0, 1)
    bias = _biases(branches)
    return replace(branches[0], weight=weight, bias=torch.stack(bias, dim=1).flatten() if bias else None)


def split_concat(*convs: AffineConv) -> AffineConv:
    """`verbs.split_concat` of ordinary convolutions."""
    parts = unified("split_concat", convs)
    window = Window.over("split_concat", parts)
    branches = [window.conv(window.kernel([conv], conv.groups), conv.bias, conv.groups) for conv in parts]
    groups = _common_blocks(branches)
    reads = sum(conv.in_channels for conv in branches) // groups
    rows: list[Tensor] = []
    start = 0
    for conv in branches:
        rows.append(_place_blocks(conv, start, reads))
        start += conv.in_channels
    return replace(branches[0], weight=torch.cat(rows), bias=_joined_bias(branches), groups=groups)


def _common_blocks(convs: Sequence[AffineConv]) -> int:
    """The most groups such that none cuts through a block that reads some channels to write others."""
    reads, writes = sum(c.in_channels for c in convs), sum(c.out_channels for c in convs)
    edges: set[tuple[int, int]] = set()
    into = out = 0
    for conv in convs:
        a, b = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        edges |= {(into + a * g, out + b * g) for g in range(conv.groups)}
        into, out = into + conv.in_channels, out + conv.out_channels
    common = math.gcd(reads, writes)
    finest = (n for n in range(common, 0, -1) if common % n == 0)
    return next(n for n in finest if all((reads // n * g, writes // n * g) in edges for g in range(n)))


def _place_blocks(conv: AffineConv, start: int, reads: int) -> Tensor:
    """The rows of a conv whose input starts at channel ``start``, in groups that read ``reads`` channels."""
    width = conv.in_channels // conv.groups
    first = start + width * torch.arange(conv.groups, device=conv.weight.device)
    offsets = (first % reads).repeat_interleave(conv.out_channels // conv.groups)
    columns = offsets[:, None] + torch.arange(width, device=conv.weight.device)
    index = columns.reshape(*columns.shape, *(1,) * conv.rank).expand(conv.weight.shape)
    empty = conv.weight.new_zeros(conv.out_channels, reads, *conv.kernel_size)
    return empty.scatter(1, index, conv.weight)


def compose(first: AffineConv, second: AffineConv) -> AffineConv:
    """`verbs.compose` of ordinary convolutions."""
    first, second = unified("compose", (first, second))
    if first.out_channels != second.in_channels:
        raise FoldError(
            f"cannot compose {first!r} with {second!r}: the first writes {first.out_channels} channels, "
            f"the second reads {second.in_channels}"
        )
    mode = _composed_padding_mode(first, second)
    weight, dilation = _composed_weight(first, second)
    padding = tuple(
        (p1[0] + s * p2[0], p1[1] + s * p2[1])
        for p1, s, p2 in zip(first.padding, first.stride, second.padding, strict=True)
    )
    return AffineConv(
        weight=weight,
        bias=_composed_bias(first, second),
        stride=tuple(s1 * s2 for s1, s2 in zip(first.stride, second.stride, strict=True)),
        padding=padding,
        dilation=dilation,
        groups=math.gcd(first.groups, second.groups),
        padding_mode=mode,
    )


def _composed_padding_mode(first: AffineConv, second: AffineConv) -> PaddingMode:
    if not second.pads:
        return first.padding_mode
    if second.padding_mode != "zeros":
        return _mode_of_padding_a_pointwise_map(first, second)
    if first.bias is not None:
        raise _border_error(first, second, "zero padding after a bias is not a convolution at the border")
    if first.pads and first.padding_mode != "zeros":
        raise _border_error(first, second, f"{first.padding_mode} padding before zero padding is not one padding")
    if not all(_covers_border(first, dim, pair) for dim, pair in enumerate(second.padding)):
        raise _border_error(first, second, "the zeros stand where the first kernel would still see the input")
    return "zeros"


def _mode_of_padding_a_pointwise_map(first: AffineConv, second: AffineConv) -> PaddingMode:
    """Reflect, replicate and circular padding repeat pixels, so they commute with an unpadded pointwise map."""
    if not first.is_pointwise:
        reason = f"{second.padding_mode} padding commutes with an unpadded pointwise map of stride 1 only"
        raise _border_error(first, second, reason)
    return second.padding_mode


def _covers_border(first: AffineConv, dim: int, padding: Pair) -> bool:
    """Whether ``first`` gives zeros by itself beyond the sides that ``second`` pads."""
    (before, after), reach = first.padding[dim], first.reach[dim]
    return (not padding[0] or before > reach - first.stride[dim]) and (not padding[1] or after >= reach)


def _border_error(first: AffineConv, second: AffineConv, reason: str) -> FoldError:
    return FoldError(f"cannot compose {first!r} with {second!r}: {reason}; move the padding to the first convolution")


def _composed_weight(first: AffineConv, second: AffineConv) -> tuple[Tensor, tuple[int, ...]]:
    if second.is_diagonal:
        return first.weight * second.weight.reshape(-1, *(1,) * (first.rank + 1)), first.dilation
    if first.is_diagonal:
        return second.weight * _per_input_channel(first.weight.flatten(), second), second.dilation
    if not first.rank:
        pointwise = _composed_weight(first.promote(1), second.promote(1))[0]
        return pointwise.squeeze(-1), ()
    return _correlated_kernels(first, second)


def _per_input_channel(values: Tensor, conv: AffineConv) -> Tensor:
    """A value per input channel, shaped to multiply a grouped kernel."""
    per_group = values.reshape(conv.groups, -1).repeat_interleave(conv.out_channels // conv.groups, dim=0)
    return per_group.reshape(conv.out_channels, -1, *(1,) * conv.rank)


def _correlated_kernels(first: AffineConv, second: AffineConv) -> tuple[Tensor, tuple[int, ...]]:
    """Slide the flipped second kernel over the first: the taps of the chain lie at ``d1 i + s1 d2 j``."""
    groups = math.gcd(first.groups, second.groups)
    first, second = ungroup(first, groups), ungroup(second, groups)
    steps = tuple(s * d for s, d in zip(first.stride, second.dilation, strict=True))
    dilation = tuple(
        math.gcd(d1 if k1 > 1 else 0, step if k2 > 1 else 0) or 1
        for k1, d1, k2, step in zip(first.kernel_size, first.dilation, second.kernel_size, steps, strict=True)
    )
    spread = tuple(
        d1 // d if k > 1 else 1 for k, d1, d in zip(first.kernel_size, first.dilation, dilation, strict=True)
    )
    slide = tuple(step // d if k > 1 else 1 for k, step, d in zip(second.kernel_size, steps, dilation, strict=True))
    if not any(first.reach):
        return _mixed_channels(first, second, groups), dilation
    margin = tuple((k - 1) * step for k, step in zip(second.kernel_size, slide, strict=True))
    correlate = (F.conv1d, F.conv2d, F.conv3d)[first.rank - 1]
    spatial = tuple(range(2, second.weight.ndim))
    with _full_precision(first.weight):
        product = correlate(
            insert_zeros(first.weight, spread).transpose(0, 1),
            second.weight.flip(spatial),
            padding=margin,
            dilation=slide,
            groups=groups,
        )
    return product.transpose(0, 1), dilation


def _mixed_channels(first: AffineConv, second: AffineConv, groups: int) -> Tensor:
    """The second kernel over the channels in front of a first one of a single tap."""
    taps = second.weight.flatten(2).unflatten(0, (groups, -1))
    mix = first.weight.flatten(1).unflatten(0, (groups, -1))
    with _full_precision(taps):
        product = torch.einsum("gomt,gmi->goit", taps, mix)
    return product.flatten(0, 1).unflatten(2, second.kernel_size)


def _full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast: a kernel merged in bfloat16 is not the kernel of the branches."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _composed_bias(first: AffineConv, second: AffineConv) -> Tensor | None:
    if first.bias is None:
        return second.bias
    taps = second.weight.flatten(2).sum(2) if second.rank else second.weight
    per_group = taps.reshape(second.groups, -1, taps.shape[1])
    with _full_precision(taps):
        carried = (per_group @ first.bias.reshape(second.groups, -1, 1)).flatten()
    return carried if second.bias is None else carried + second.bias


def pad_kernel(conv: AffineConv, kernel_size: int | Sequence[int]) -> AffineConv:
    """`verbs.pad_kernel` of an ordinary convolution."""
    size = (kernel_size,) * conv.rank if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(size) != conv.rank or any(new < old for new, old in zip(size, conv.kernel_size, strict=True)):
        raise FoldError(f"cannot pad {conv!r} to kernel_size={size}: kernels only grow, per spatial dim")
    dims = zip(size, conv.kernel_size, conv.dilation, conv.padding, strict=True)
    return grow(conv, tuple(_even_margin(new - old, dilation, pair) for new, old, dilation, pair in dims))


def _even_margin(taps: int, dilation: int, padding: Pair) -> Pair:
    """Split new taps so that the padding before and after come out as equal as possible."""
    before = (padding[1] - padding[0] + dilation * taps) // (2 * dilation)
    before = min(max(before, 0), taps)
    return before * dilation, (taps - before) * dilation


def ungroup(conv: AffineConv, groups: int) -> AffineConv:
    """`verbs.ungroup` of an ordinary convolution."""
    if groups < 1 or conv.groups % groups:
        raise FoldError(f"cannot ungroup {conv!r} to groups={groups}: the new groups must divide the old")
    if groups == conv.groups:
        return conv
    return replace(conv, weight=Window.over("ungroup", [conv]).kernel([conv], groups), groups=groups)


def _aligned(verb: str, convs: Sequence[AffineConv]) -> list[AffineConv]:
    """Branches over one input with one geometry and one group count, so that only weights differ."""
    branches = _over_one_input(verb, convs)
    window, groups = Window.over(verb, branches), _common_groups(branches)
    return [window.conv(window.kernel([conv], groups), conv.bias, groups) for conv in branches]


def _over_one_input(verb: str, convs: Sequence[AffineConv]) -> list[AffineConv]:
    branches = unified(verb, convs)
    require_same(verb, branches, "in_channels", lambda conv: conv.in_channels)
    return branches


def _common_groups(convs: Sequence[AffineConv]) -> int:
    return math.gcd(*(conv.groups for conv in convs))


def _biases(convs: Sequence[AffineConv]) -> list[Tensor] | None:
    """A bias for every branch, zeros where one has none; None if no branch has one."""
    if all(conv.bias is None for conv in convs):
        return None
    return [conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias for conv in convs]


def _joined_bias(convs: Sequence[AffineConv]) -> Tensor | None:
    biases = _biases(convs)
    return torch.cat(biases) if biases else None
