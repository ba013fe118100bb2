"""Transposed convolutions to draw, and torch's own modules as their oracle."""

import math
from dataclasses import replace

import torch
from fusion import laws
from fusion.laws import assert_same
from fusion.modules import prepared
from hypothesis import strategies as st
from strategies import LIMITS, affine_convs, channel_counts, divisors, per_dim, randn, seeds, spatial_ranks
from torch import Tensor, nn

from repblocks.fusion import AffineConv, AffineConvTranspose

MODULES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def run(conv: AffineConv | AffineConvTranspose, x: Tensor) -> Tensor:
    """What torch's module makes of the value, its full output cut and extended by slices."""
    if isinstance(conv, AffineConv):
        return laws.run(conv, x)
    module = MODULES[conv.rank - 1](
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, groups=conv.groups, dilation=conv.dilation
    )
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    module.load_state_dict({"weight": conv.weight, "bias": torch.zeros_like(bias)}, assign=True)
    with torch.no_grad():
        full = module(x)
    for dim, (before, after) in enumerate(conv.padding, start=2):
        rows = torch.arange(before, full.shape[dim] - after)
        inside = (rows >= 0) & (rows < full.shape[dim])
        kept = full.index_select(dim, rows.clamp(0, full.shape[dim] - 1))
        full = kept * inside.reshape(-1, *(1,) * (full.ndim - dim - 1))
    return full + bias.reshape(-1, *(1,) * conv.rank)


def run_chain(chain, x: Tensor) -> Tensor:
    for conv in chain:
        x = run(conv, x)
    return x


def assert_value_is(conv: AffineConvTranspose, x: Tensor, expected: Tensor) -> None:
    """The value gives ``expected`` by itself, by the oracle, and as a plain module."""
    assert isinstance(conv, AffineConvTranspose)
    assert_same(expected, conv(x))
    assert_same(expected, run(conv, x))
    with torch.no_grad():
        assert_same(expected, conv.to_module()(x))


@st.composite
def transposed_convs(draw, *, rank: int, in_channels: int | None = None, bias: bool | None = None, **given):
    """Any valid value; what is given is kept, the rest is drawn."""
    read = draw(channel_counts) if in_channels is None else in_channels
    written = given.get("out_channels") or draw(channel_counts)
    groups = draw(st.sampled_from(divisors(math.gcd(read, written))))
    side = st.integers(-2, 2)
    geometry = {
        "kernel_size": per_dim(st.integers(1, LIMITS[rank].kernel), rank),
        "stride": per_dim(st.integers(1, 3), rank),
        "padding": per_dim(st.tuples(side, side), rank),
        "dilation": per_dim(st.integers(1, LIMITS[rank].dilation), rank),
    }
    geometry = {name: given.get(name) or draw(values) for name, values in geometry.items()}
    has_bias = draw(st.booleans()) if bias is None else bias
    return AffineConvTranspose(
        weight=randn(draw(seeds), read, written // groups, *geometry.pop("kernel_size")),
        bias=randn(draw(seeds), written) if has_bias else None,
        groups=groups,
        **geometry,
    )


def input_of(conv, seed: int, size: int = 5, rank: int | None = None) -> Tensor:
    """Not square; as drawn here, one transposed conv cuts off at most 4 pixels."""
    return randn(seed, 2, conv.in_channels, *(size, size + 1, size + 2)[: rank or conv.rank])


@st.composite
def convs_with_input(draw):
    conv = draw(transposed_convs(rank=draw(spatial_ranks)))
    return conv, input_of(conv, draw(seeds))


@st.composite
def transposed_modules(draw) -> nn.Module:
    rank, groups = draw(spatial_ranks), draw(st.integers(1, 3))
    stride, dilation = draw(per_dim(st.integers(1, 3), rank)), draw(per_dim(st.integers(1, 2), rank))
    extra = tuple(draw(st.integers(0, max(sizes) - 1)) for sizes in zip(stride, dilation, strict=True))
    module = MODULES[rank - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        draw(per_dim(st.integers(1, LIMITS[rank].kernel), rank)),
        stride=stride,
        padding=draw(per_dim(st.integers(0, 2), rank)),
        output_padding=extra,
        groups=groups,
        bias=draw(st.booleans()),
        dilation=dilation,
    )
    return prepared(module, draw(seeds))


@st.composite
def chains(draw):
    """Two neighbours, at least one of them transposed, whose channels meet: some of them do not compose."""
    rank, ordinary = draw(spatial_ranks), draw(st.sampled_from((None, 0, 1)))
    links = []
    for index in range(2):
        channels = {
            "in_channels": links[0].out_channels if links else None,
            "bias": draw(st.sampled_from((None, False))),
        }
        links.append(
            draw(stride_1_convs(rank, **channels) if index == ordinary else transposed_convs(rank=rank, **channels))
        )
    size = 5 + max(4, LIMITS[rank].dilation * (LIMITS[rank].kernel - 1))  # the other reads or cuts off as much
    return tuple(links), input_of(links[0], draw(seeds), size, rank)


@st.composite
def stride_1_convs(draw, rank: int, **given):
    """BatchNorm-like, pointwise, or any kernel: without stride, padded by zeros."""
    if draw(st.booleans()):
        return draw(affine_convs(rank=0, **given))
    return draw(affine_convs(rank=rank, stride=(1,) * rank, padding_mode="zeros", **given))


@st.composite
def clean_chains(draw, length: int = 2):
    """Chains that always compose: no bias and no cut but in the last, or a pointwise map in its place."""
    rank = draw(spatial_ranks)
    uncut = {"padding": ((0, 0),) * rank, "stride": draw(per_dim(st.integers(1, 2), rank))}
    links = [draw(transposed_convs(rank=rank, bias=False, **uncut))]
    for _ in range(length - 1):
        channels = {"in_channels": links[-1].out_channels}
        pointwise = draw(st.booleans())
        links.append(
            draw(
                affine_convs(rank=0, bias=False, **channels)
                if pointwise
                else transposed_convs(rank=rank, bias=False, **uncut, **channels)
            )
        )
    links[-1] = replace(links[-1], bias=randn(draw(seeds), links[-1].out_channels))
    return tuple(links), input_of(links[0], draw(seeds), size=3)


@st.composite
def branches(draw, *, same_in: bool = True, same_out: bool = True):
    """Transposed branches of one stride and output grid, aligned anyhow; a conv among them where the stride is 1."""
    rank = draw(spatial_ranks)
    stride, gain = draw(per_dim(st.integers(1, 3), rank)), draw(per_dim(st.integers(-1, 2), rank))
    read, written = draw(channel_counts), draw(channel_counts)
    convs = []
    for _ in range(draw(st.integers(1, 3))):
        kernel_size = draw(per_dim(st.integers(1, LIMITS[rank].kernel), rank))
        dilation = draw(per_dim(st.integers(1, LIMITS[rank].dilation), rank))
        cut = [d * (k - 1) - g for k, d, g in zip(kernel_size, dilation, gain, strict=True)]
        before = [draw(st.integers(-2, 3)) for _ in cut]
        geometry = {
            "kernel_size": kernel_size,
            "dilation": dilation,
            "stride": stride,
            "padding": tuple((b, total - b) for b, total in zip(before, cut, strict=True)),
            "in_channels": read if same_in else draw(channel_counts),
            "out_channels": written if same_out else draw(channel_counts),
        }
        convs.append(draw(transposed_convs(rank=rank, **geometry)))
    if not any(gain) and set(stride) == {1}:
        convs.append(draw(affine_convs(rank=0, in_channels=convs[0].in_channels, out_channels=convs[0].out_channels)))
    total = convs[0].in_channels if same_in else sum(conv.in_channels for conv in convs)
    return tuple(convs), randn(draw(seeds), 2, total, *(5, 6, 7)[:rank])


def up(*shape: int, seed: int = 1, **geometry) -> AffineConvTranspose:
    return AffineConvTranspose(weight=randn(seed, *shape), **geometry)


def conv_norm_up(read: int, written: int, kernel_size, **geometry) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(read, written, kernel_size, **geometry), nn.BatchNorm2d(written))
