"""Blocks drawn at random leave the same in every execution."""

from blocks.merged.cases import METHODS, assert_same_step, image, training
from blocks.merged.mixtures import mixing
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import divisors, per_dim, seeds
from support import batch_norms
from timm.layers import LayerScale2d
from torch import manual_seed, nn

import repblocks as rb
from repblocks.blocks.branches import after_norm, conv, pointwise
from repblocks.blocks.layers import AlignedAvgPool2d, Constant, Shift
from repblocks.blocks.spec import ConvSpec
from repblocks.fusion import Sum


@st.composite
def specs(draw):
    in_channels, out_channels = draw(st.sampled_from([(4, 4), (2, 4), (4, 6), (3, 3), (1, 2)]))
    groups = draw(st.sampled_from([g for g in divisors(in_channels) if out_channels % g == 0]))
    pads = st.integers(0, 3)
    padding = draw(st.one_of(st.none(), st.tuples(per_dim(pads, 2), per_dim(pads, 2))))
    return ConvSpec.of(
        in_channels,
        out_channels,
        draw(per_dim(st.integers(1, 4), 2)),
        stride=draw(per_dim(st.integers(1, 3), 2)),
        padding=padding,
        dilation=draw(per_dim(st.integers(1, 2), 2)),
        groups=groups,
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "circular"])),
    )


def norms(channels):
    options = {
        "eps": st.sampled_from([1e-5, 1e-3, 0.5]),
        "momentum": st.sampled_from([None, 0.1, 1.0]),
        "affine": st.booleans(),
    }
    return st.builds(lambda **drawn: nn.BatchNorm2d(channels, **drawn), **options)


def links(channels):
    """What may follow a convolution or stand alone, channel by channel."""
    return st.one_of(
        norms(channels),
        norms(channels),
        st.builds(Constant, st.sampled_from([-1.0, 0.5])),
        st.builds(lambda: LayerScale2d(channels, 0.7)),
        st.builds(lambda: Shift(channels)),
        st.builds(nn.Identity),
    )


@st.composite
def branches(draw, spec):
    whole = st.builds(conv, st.just(spec), bias=st.booleans())
    single = st.builds(lambda bias: conv(spec, (1, 1), bias=bias), st.booleans())
    strip = st.builds(lambda bias: conv(spec, (1, spec.kernel_size[1]), bias=bias), st.booleans())
    pool = st.builds(lambda: nn.Sequential(AlignedAvgPool2d(spec), pointwise(spec, spec.out_channels)))
    deep = st.builds(lambda: nn.Sequential(conv(spec), nn.BatchNorm2d(spec.out_channels), mixing(spec, bias=True)))
    behind = st.builds(lambda: after_norm(spec, conv))
    maps = [whole, whole, single, single, strip, pool, deep, behind]
    if spec.keeps_the_map:
        maps += [st.builds(nn.Identity)] * 2
    return nn.Sequential(draw(st.one_of(maps)), *draw(st.lists(links(spec.out_channels), max_size=3)))


@st.composite
def blocks(draw, spec):
    summed = draw(st.lists(branches(spec), min_size=1, max_size=3))
    if draw(st.booleans()):
        inner = nn.Sequential(Sum(summed), *draw(st.lists(links(spec.out_channels), min_size=1, max_size=2)))
        summed = [inner, *draw(st.lists(branches(spec), max_size=1))]
    block = rb.BranchConv(summed, in_channels=spec.in_channels)
    for norm in batch_norms(block):
        norm.train(draw(st.integers(0, 5)) > 0)
    return block


def smallest(spec):
    """The input for which the output has a pixel that reads the map: of padding alone, nothing varies."""
    spans = [d * (k - 1) + 1 - sum(p) for d, k, p in zip(spec.dilation, spec.kernel_size, spec.padding, strict=True)]
    reached = [s + max(p) + d for s, p, d in zip(spec.stride, spec.padding, spec.dilation, strict=True)]
    return [max(sizes) for sizes in zip(spans, reached, strict=True)]


@st.composite
def cases(draw):
    manual_seed(draw(seeds))
    spec = draw(specs())
    least = smallest(spec)
    size = [draw(st.integers(n, n + 5)) for n in least]
    batch = draw(st.integers(1, 3))
    # One value more per channel than a single one, which BatchNorm refuses.
    batch += batch == 1 and size[0] < least[0] + spec.stride[0] and size[1] < least[1] + spec.stride[1]
    block = draw(blocks(spec))
    modes = [norm.training for norm in batch_norms(block)]
    training(block)
    for norm, mode in zip(batch_norms(block), modes, strict=True):
        norm.train(mode)
    for parameter in block.parameters():
        parameter.requires_grad_(draw(st.integers(0, 7)) > 0)
    return block, image(batch, spec.in_channels, *size, channels_last=draw(st.booleans())).requires_grad_(
        draw(st.integers(0, 5)) > 0
    )


@given(cases())
@settings(max_examples=100)
def test_a_random_block_leaves_the_same(case):
    assert_same_step(*case, *METHODS, "auto")
