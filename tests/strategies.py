"""Hypothesis strategies that draw valid geometries by construction; tensors come from a drawn seed, in float64."""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from repblocks.fusion import AffineConv
from repblocks.fusion.affine_conv import PADDING_MODES

torch.set_printoptions(edgeitems=1, threshold=20)  # a failing case is reported by its geometry, not by its numbers

CHANNELS = (1, 2, 3, 4, 6)
REPEATING_MODES = PADDING_MODES[1:]
ACTIVATIONS = (nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.PReLU)

seeds = st.integers(0, 2**31 - 1)
ranks = st.integers(0, 3)
spatial_ranks = st.integers(1, 3)
channel_counts = st.sampled_from(CHANNELS)


@dataclass(frozen=True)
class Limits:
    """Largest sizes per spatial dim: small enough that a case takes milliseconds."""

    kernel: int
    dilation: int
    stride: int
    padding: int = 2


LIMITS = {0: Limits(1, 1, 1), 1: Limits(5, 3, 3), 2: Limits(4, 2, 2), 3: Limits(2, 2, 2)}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_dim(elements, rank: int):
    return st.tuples(*(elements,) * rank)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def kernel_sizes(rank: int):
    return per_dim(st.integers(1, LIMITS[rank].kernel), rank)


def dilations(rank: int):
    return per_dim(st.integers(1, LIMITS[rank].dilation), rank)


def strides(rank: int):
    return per_dim(st.integers(1, LIMITS[rank].stride), rank)


def paddings(rank: int):
    side = st.integers(0, LIMITS[rank].padding)
    return per_dim(st.tuples(side, side), rank)


def smallest_input(*chain: AffineConv, rank: int) -> tuple[int, ...]:
    """Least size per dim on which every conv of a chain is defined, whatever its padding mode."""
    size = (1,) * rank
    for conv in reversed([conv.promote(rank) for conv in chain]):
        dims = zip(size, conv.stride, conv.reach, conv.padding, strict=True)
        size = tuple(max(s * (n - 1) + reach + 1 - sum(pair), max(pair) + 1) for n, s, reach, pair in dims)
    return size


@st.composite
def inputs(draw, *chains: tuple[AffineConv, ...], rank: int, channels: int | None = None) -> Tensor:
    """A batch on which every chain is defined, often of the least size, where borders count most."""
    least = [max(sizes) for sizes in zip(*(smallest_input(*chain, rank=rank) for chain in chains), strict=True)]
    size = tuple(n + draw(st.integers(0, 3)) for n in least)
    channels = chains[0][0].in_channels if channels is None else channels
    return randn(draw(seeds), draw(st.integers(2, 3)), channels, *size)


@st.composite
def affine_convs(draw, *, rank: int, in_channels: int | None = None, bias: bool | None = None, **given) -> AffineConv:
    """Any valid value; what is given is kept, the rest is drawn."""
    read = draw(channel_counts) if in_channels is None else in_channels
    written = given.get("out_channels") or draw(channel_counts)
    groups = draw(st.sampled_from(divisors(math.gcd(read, written))))
    kernel_size = given["kernel_size"] if "kernel_size" in given else draw(kernel_sizes(rank))
    has_bias = draw(st.booleans()) if bias is None else bias
    return AffineConv(
        weight=randn(draw(seeds), written, read // groups, *kernel_size),
        bias=randn(draw(seeds), written) if has_bias else None,
        stride=given["stride"] if "stride" in given else draw(strides(rank)),
        padding=given["padding"] if "padding" in given else draw(paddings(rank)),
        dilation=given["dilation"] if "dilation" in given else draw(dilations(rank)),
        groups=groups,
        padding_mode=given.get("padding_mode") or draw(st.sampled_from(PADDING_MODES)),
    )


@st.composite
def convs_with_input(draw) -> tuple[AffineConv, Tensor]:
    conv = draw(affine_convs(rank=draw(ranks)))
    return conv, draw(inputs((conv,), rank=conv.rank))


@st.composite
def grown_kernels(draw) -> tuple[AffineConv, tuple[int, ...], Tensor]:
    """A conv, a kernel size to grow to, and an input that the grown padding may reflect."""
    conv = draw(affine_convs(rank=draw(ranks)))
    growth = draw(per_dim(st.integers(0, 3), conv.rank))
    margins = [d * n for d, n in zip(conv.dilation, growth, strict=True)]
    padding = tuple((p + m, q + m) for (p, q), m in zip(conv.padding, margins, strict=True))
    kernel_size = tuple(k + n for k, n in zip(conv.kernel_size, growth, strict=True))
    return conv, kernel_size, draw(inputs((conv,), (replace(conv, padding=padding),), rank=conv.rank))


@st.composite
def ungroupings(draw) -> tuple[AffineConv, int, Tensor]:
    """A conv, often grouped, and a group count that divides its own."""
    rank, groups = draw(ranks), draw(st.sampled_from((1, 2, 4, 6)))
    blocks = (groups * draw(st.integers(1, 2)) for _ in range(2))
    conv = draw(affine_convs(rank=rank, in_channels=next(blocks), out_channels=next(blocks)))
    return conv, draw(st.sampled_from(divisors(conv.groups))), draw(inputs((conv,), rank=rank))


@st.composite
def diracs(draw) -> tuple[tuple[int, ...], int, Tensor]:
    """Kernel size and groups of a dirac kernel, and an input with its channels."""
    rank, groups = draw(spatial_ranks), draw(st.integers(1, 4))
    size = draw(per_dim(st.integers(1, 5), rank))
    return draw(kernel_sizes(rank)), groups, randn(draw(seeds), 2, groups * draw(st.integers(1, 3)), *size)


Chain = tuple[tuple[AffineConv, ...], Tensor]


@st.composite
def unpadded_chains(draw, length: int = 2) -> Chain:
    """Only the first conv pads, in any mode; maps without spatial dims may stand anywhere."""
    rank = draw(ranks)
    own_rank = st.sampled_from((rank, rank, 0))
    links = [draw(affine_convs(rank=draw(own_rank)))]
    for _ in range(length - 1):
        link_rank = draw(own_rank)
        links.append(
            draw(affine_convs(rank=link_rank, in_channels=links[-1].out_channels, padding=((0, 0),) * link_rank))
        )
    return tuple(links), draw(inputs(tuple(links), rank=rank))


@st.composite
def covered_chains(draw, length: int = 2) -> Chain:
    """Every conv pads with zeros, and all but the last have no bias and give zeros beyond the border by themselves."""
    rank = draw(spatial_ranks)
    covered = draw(per_dim(st.tuples(st.booleans(), st.booleans()), rank))
    links: list[AffineConv] = []
    for index in range(length):
        last = index == length - 1
        geometry = {"kernel_size": draw(kernel_sizes(rank)), "dilation": draw(dilations(rank))}
        stride = draw(strides(rank))
        padding = tuple(
            _covering_padding(draw, sides, reach=d * (k - 1), stride=s, first=not index, last=last)
            for sides, k, d, s in zip(covered, geometry["kernel_size"], geometry["dilation"], stride, strict=True)
        )
        channels = links[-1].out_channels if links else None
        geometry |= {"stride": stride, "padding": padding, "padding_mode": "zeros"}
        links.append(draw(affine_convs(rank=rank, in_channels=channels, bias=None if last else False, **geometry)))
    return tuple(links), draw(inputs(tuple(links), rank=rank))


def _covering_padding(draw, covered, *, reach: int, stride: int, first: bool, last: bool) -> tuple[int, int]:
    """At least what covers the border on the covered sides; on the others only the first conv pads."""
    least = (0, 0) if last else (max(reach - stride + 1, 0), reach)
    free = st.integers(0, 2)
    sides = (n + draw(free) if side else draw(free) if first else 0 for side, n in zip(covered, least, strict=True))
    before, after = sides
    return before, after


@st.composite
def pointwise_chains(draw, length: int = 2) -> Chain:
    """Unpadded pointwise convs before one that pads by repeating pixels."""
    rank = draw(spatial_ranks)
    pointwise = {"stride": (1,) * rank, "padding": ((0, 0),) * rank, "kernel_size": (1,) * rank}
    links = [draw(affine_convs(rank=rank, **pointwise))]
    for _ in range(length - 2):
        links.append(draw(affine_convs(rank=rank, in_channels=links[-1].out_channels, **pointwise)))
    mode = draw(st.sampled_from(REPEATING_MODES))
    links.append(draw(affine_convs(rank=rank, in_channels=links[-1].out_channels, padding_mode=mode)))
    return tuple(links), draw(inputs(tuple(links), rank=rank))


def chains(length: int = 2):
    """Chains of which every two neighbours compose, in all three ways that the border allows."""
    return st.one_of(unpadded_chains(length), covered_chains(length), pointwise_chains(length))


@st.composite
def any_pairs(draw) -> Chain:
    """Two convs whose channels meet, padded in any way: many of them do not compose."""
    rank = draw(st.integers(1, 2))
    zeros, no_bias = st.sampled_from(("zeros", None)), st.sampled_from((False, None))
    first = draw(affine_convs(rank=rank, bias=draw(no_bias), padding_mode=draw(zeros)))
    second = draw(affine_convs(rank=rank, in_channels=first.out_channels, padding_mode=draw(zeros)))
    return (first, second), draw(inputs((first, second), rank=rank))


@st.composite
def branch_geometries(draw, rank: int):
    """A strategy of convs with one stride and one output grid, aligned anyhow, and one padding mode where they pad."""
    grid = draw(per_dim(st.integers(-2, 1), rank))
    stride, mode = draw(strides(rank)), draw(st.sampled_from(PADDING_MODES))

    @st.composite
    def branches(draw, **given) -> AffineConv:
        windows = [draw(st.sampled_from(_windows(rank, gain))) for gain in grid]
        padding = tuple(_split(draw, gain + d * (k - 1)) for gain, (k, d) in zip(grid, windows, strict=True))
        return draw(
            affine_convs(
                rank=rank,
                kernel_size=tuple(k for k, _ in windows),
                dilation=tuple(d for _, d in windows),
                stride=stride,
                padding=padding,
                padding_mode=mode if any(map(any, padding)) else None,
                **given,
            )
        )

    keeps_grid = not any(grid) and all(s == 1 for s in stride)
    return branches, keeps_grid


def _windows(rank: int, gain: int) -> list[tuple[int, int]]:
    """Kernel sizes and dilations whose total padding, ``gain`` plus the reach, is not negative."""
    sizes, spacings = range(1, LIMITS[rank].kernel + 2), range(1, LIMITS[rank].dilation + 1)
    return [(k, d) for k in sizes for d in spacings if d * (k - 1) + gain >= 0]


def _split(draw, total: int) -> tuple[int, int]:
    before = draw(st.integers(0, total))
    return before, total - before


@st.composite
def parallel(draw, *, same_in: bool = True, same_out: bool = True, count: int | None = None, **given):
    """Branches that can be added, concatenated or interleaved, with inputs of their own channel counts.

    Where the grid is kept, a map without spatial dims may be among them.
    """
    rank = draw(ranks)
    branches, keeps_grid = draw(branch_geometries(rank))
    read, written = draw(channel_counts), draw(channel_counts)
    convs: list[AffineConv] = []
    for _ in range(count or draw(st.integers(2, 3))):
        channels = {
            "in_channels": read if same_in else draw(channel_counts),
            "out_channels": written if same_out else draw(channel_counts),
        }
        flat = keeps_grid and draw(st.booleans())
        convs.append(draw(affine_convs(rank=0, **channels) if flat else branches(**channels, **given)))
    total = read if same_in else sum(conv.in_channels for conv in convs)
    return tuple(convs), draw(inputs(*((conv,) for conv in convs), rank=rank, channels=total))


@st.composite
def branches_then_conv(draw) -> tuple[tuple[AffineConv, ...], AffineConv, Tensor]:
    """Two branches and a conv without bias or padding behind their sum."""
    (a, b), _ = draw(parallel(count=2))
    rank = max(a.rank, b.rank)
    after = draw(affine_convs(rank=rank, in_channels=a.out_channels, padding=((0, 0),) * rank, bias=False))
    return (a, b), after, draw(inputs((a, after), (b, after), rank=rank))


@st.composite
def conv_then_branches(draw) -> tuple[AffineConv, tuple[AffineConv, ...], Tensor]:
    """A conv with a bias that keeps the grid as it likes, and two branches behind it that do not pad."""
    rank = draw(spatial_ranks)
    kernel_size, stride = draw(kernel_sizes(rank)), draw(strides(rank))
    geometry = {"kernel_size": kernel_size, "stride": stride, "padding": ((0, 0),) * rank, "dilation": (1,) * rank}
    before = draw(affine_convs(rank=rank))
    channels = {"in_channels": before.out_channels, "out_channels": draw(channel_counts)}
    a, b = (draw(affine_convs(rank=rank, **channels, **geometry)) for _ in range(2))
    return before, (a, b), draw(inputs((before, a), rank=rank))


@st.composite
def shortcut_chains(draw) -> tuple[tuple[AffineConv, ...], tuple[nn.Module, ...], Tensor]:
    """One to four convs that keep the grid and lead back to the channels they began with, with activations between."""
    rank, ends, length = draw(ranks), draw(channel_counts), draw(st.integers(1, 4))
    widths = [ends, *(draw(channel_counts) for _ in range(length - 1)), ends]
    convs: list[AffineConv] = []
    for read, written in itertools.pairwise(widths):
        windows = [draw(st.sampled_from(_windows(rank, 0))) for _ in range(rank)]
        geometry = {
            "kernel_size": tuple(k for k, _ in windows),
            "dilation": tuple(d for _, d in windows),
            "padding": tuple(_split(draw, d * (k - 1)) for k, d in windows),
            "stride": (1,) * rank,
        }
        convs.append(draw(affine_convs(rank=rank, in_channels=read, out_channels=written, **geometry)))
    activations = tuple(draw(st.sampled_from(ACTIVATIONS))().double() for _ in range(length - 1))
    room = LIMITS[rank].dilation  # a kernel without a tap on the output pixel grows by less than its dilation
    roomy = [replace(conv, padding=tuple((p + room, q) for p, q in conv.padding)) for conv in convs]
    return tuple(convs), activations, draw(inputs(*((conv,) for conv in roomy), rank=rank, channels=ends))


@st.composite
def uncovered_pairs(draw) -> tuple[AffineConv, AffineConv]:
    """Zero padding behind a bias, or behind a kernel that still sees the input there."""
    rank = draw(st.integers(1, 2))
    biased = draw(st.booleans())
    kernel_size = draw(per_dim(st.integers(1 if biased else 2, LIMITS[rank].kernel), rank))
    stride = (1,) * rank if biased else draw(strides(rank))
    padding = tuple((draw(st.integers(0, max(k - 2, 0))),) * 2 for k in kernel_size)
    geometry = {"kernel_size": kernel_size, "dilation": (1,) * rank, "stride": stride, "padding_mode": "zeros"}
    first = draw(affine_convs(rank=rank, bias=biased, padding=padding, **geometry))
    return first, draw(_border_readers(first, "zeros"))


@st.composite
def repeated_pairs(draw) -> tuple[AffineConv, AffineConv]:
    """Reflect, replicate or circular padding behind an unpadded kernel of several taps."""
    rank = draw(st.integers(1, 2))
    kernel_size = draw(per_dim(st.integers(2, LIMITS[rank].kernel), rank))
    geometry = {"kernel_size": kernel_size, "padding": ((0, 0),) * rank}
    first = draw(affine_convs(rank=rank, **geometry))
    return first, draw(_border_readers(first, draw(st.sampled_from(REPEATING_MODES))))


@st.composite
def _border_readers(draw, first: AffineConv, mode: str) -> AffineConv:
    """A conv whose taps read every padded pixel."""
    kernel_size = draw(per_dim(st.integers(2, LIMITS[first.rank].kernel), first.rank))
    padding = tuple((draw(st.integers(1, k - 1)), draw(st.integers(1, k - 1))) for k in kernel_size)
    ones = (1,) * first.rank
    geometry = {"kernel_size": kernel_size, "padding": padding, "stride": ones, "dilation": ones}
    return draw(affine_convs(rank=first.rank, in_channels=first.out_channels, padding_mode=mode, **geometry))


@st.composite
def conv_modules(draw) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A convolution module of any rank with any of torch's own padding arguments, in float64."""
    rank, groups = draw(spatial_ranks), draw(st.integers(1, 3))
    stride, sides = draw(strides(rank)), draw(per_dim(st.integers(0, 3), rank))
    named = ["valid"] if any(s > 1 for s in stride) else ["valid", "same"]
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        draw(kernel_sizes(rank)),
        stride=stride,
        padding=draw(st.sampled_from([*named, sides])),
        dilation=draw(dilations(rank)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(PADDING_MODES)),
    )
    values = {name: randn(draw(seeds), *tensor.shape) for name, tensor in module.state_dict().items()}
    module.double().load_state_dict(values)
    return module


@st.composite
def pools(draw) -> nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d:
    """Average pooling whose divisor is the same everywhere."""
    rank = draw(spatial_ranks)
    kernel_size, stride = draw(per_dim(st.integers(1, 4), rank)), draw(per_dim(st.integers(1, 3), rank))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel_size)
    counted = True if any(padding) else draw(st.booleans())
    if rank == 1:
        return nn.AvgPool1d(kernel_size, stride, padding, count_include_pad=counted)
    divisor = draw(st.one_of(st.none(), st.integers(1, 9)))
    cls = nn.AvgPool2d if rank == 2 else nn.AvgPool3d
    return cls(kernel_size, stride, padding, count_include_pad=counted, divisor_override=divisor)
