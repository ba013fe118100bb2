"""The arithmetic of transposed convolutions, lent from ordinary ones on the input with zeros between its pixels."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter

from repblocks.errors import FoldError
from repblocks.fusion import kernels
from repblocks.fusion.affine_conv import AffineConv
from repblocks.fusion.geometry import Pair
from repblocks.fusion.transposed import AffineConvTranspose, AnyConv, from_spread_input, on_spread_input


def merge(verb: Callable[..., AffineConv], convs: Sequence[AnyConv], *same: str) -> AffineConvTranspose:
    """Merge transposed branches by a kernel for ordinary ones: ``merge(add, [a, b])(x) == a(x) + b(x)``.

    A transposed convolution is an ordinary one of stride 1 on its input with ``stride - 1`` zeros between pixels,
    which are the same for all branches. Convolutions of stride 1 may be among them. Taps are aligned by the output
    pixels that they write to.

    Args:
        verb: ``add``, ``concat``, ``interleave`` or ``split_concat`` of `kernels`.
        convs: Branches, at least one of them transposed.
        same: Attributes in which the verb needs them to agree.

    Raises:
        FoldError: Strides, output grids or the attributes named differ; or an ordinary convolution strides or pads by
            other than zeros.
    """
    branches = _as_transposed(verb.__name__, convs)
    for what in ("stride", *same):
        _require_same(verb.__name__, branches, what, attrgetter(what))
    _require_same(verb.__name__, branches, "output grids (dilation * (kernel_size - 1) - padding)", _gain)
    return lent(verb, *branches)


def lent(kernel: Callable[..., AffineConv], *convs: AffineConvTranspose) -> AffineConvTranspose:
    """Apply a kernel for ordinary convolutions over one grid to transposed ones of one stride and output grid."""
    excess = (side - r for conv in convs for r, pair in zip(conv.reach, conv.padding, strict=True) for side in pair)
    room = max(0, *excess)
    merged = kernel(*(replace(on_spread_input(conv), padding=_mirrored(conv, room)) for conv in convs))
    return from_spread_input(merged, convs[0].stride, _mirrored(merged, room))


def chain(first: AnyConv, second: AnyConv) -> AffineConvTranspose:
    """Merge a chain with a transposed convolution in it: ``chain(first, second)(x) == second(first(x))``.

    Either may be an ordinary convolution of stride 1 (BatchNorm, scale, a pointwise or any other kernel). The stride is
    ``s1 s2``, the merged reach ``s2 d1 (k1 - 1) + d2 (k2 - 1)``, the groups ``gcd(g1, g2)``. Per side, ``second``
    reads ``(d2 (k2 - 1) - padding2) // s2`` pixels beyond the output of ``first``.

    Raises:
        FoldError: Channels differ; an ordinary convolution strides or pads by other than zeros; ``second`` would
            read pixels that ``first`` computes and cuts off; or ``first`` has a bias (a BatchNorm's shift) and
            ``second`` does not give every output pixel the same share of it: it upsamples, or reads beyond the border.
    """
    first, second = _as_transposed("compose", (first, second))
    if first.out_channels != second.in_channels:
        raise _refusal(
            first, second, f"the first writes {first.out_channels} channels, the second reads {second.in_channels}"
        )
    _require_clean_border(first, second)
    steps = tuple(d * s for d, s in zip(first.dilation, second.stride, strict=True))
    product = kernels.compose(replace(on_spread_input(first), dilation=steps), on_spread_input(second))
    dims = zip(first.padding, second.stride, second.padding, strict=True)
    padding = tuple((s * p1[0] + p2[0], s * p1[1] + p2[1]) for p1, s, p2 in dims)
    return from_spread_input(product, tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)), padding)


def _require_clean_border(first: AffineConvTranspose, second: AffineConvTranspose) -> None:
    sides = [(dim, side) for dim in range(first.rank) for side in (0, 1)]
    beyond = [_pixels_read_beyond(second, dim, side) for dim, side in sides]
    if first.bias is not None and (any(s > 1 for s in second.stride) or any(depth > 0 for depth in beyond)):
        reason = "a bias or shift before a transposed convolution reaches its output pixels unequally"
        raise _refusal(first, second, f"{reason}; put the bias or BatchNorm behind it")
    if any(_cuts_written(first, dim, side, depth) for (dim, side), depth in zip(sides, beyond, strict=True)):
        reason = "the second reads pixels that the first computes and cuts off"
        raise _refusal(first, second, f"{reason}; move the cut to the second")


def _pixels_read_beyond(conv: AffineConvTranspose, dim: int, side: int) -> int:
    return (conv.reach[dim] - conv.padding[dim][side]) // conv.stride[dim]


def _cuts_written(conv: AffineConvTranspose, dim: int, side: int, depth: int) -> bool:
    """Whether any of the ``depth`` pixels cut off last, next to the output, holds more than structural zeros."""
    cut, stride = conv.padding[dim][side], conv.stride[dim]
    taps = range(0, conv.reach[dim] + 1, conv.dilation[dim])
    return any(
        pixel >= tap and (pixel - tap) % stride == 0 for pixel in range(max(cut - depth, 0), cut) for tap in taps
    )


def _refusal(first: AffineConvTranspose, second: AffineConvTranspose, reason: str) -> FoldError:
    return FoldError(f"cannot compose {first!r} with {second!r}: {reason}")


def _require_same(
    verb: str, convs: Sequence[AffineConvTranspose], what: str, read: Callable[[AffineConvTranspose], object]
) -> None:
    if len({read(conv) for conv in convs}) > 1:
        listed = ", ".join(map(repr, convs))
        raise FoldError(f"cannot {verb} {listed}: {what} differ; every branch needs the same {what}")


def _as_transposed(verb: str, convs: Sequence[AnyConv]) -> list[AffineConvTranspose]:
    rank = next(conv.rank for conv in convs if isinstance(conv, AffineConvTranspose))
    views = [conv if isinstance(conv, AffineConvTranspose) else _from_conv(verb, conv, rank) for conv in convs]
    _require_same(verb, views, "numbers of spatial dims", attrgetter("rank"))
    return views


def _from_conv(verb: str, conv: AffineConv, rank: int) -> AffineConvTranspose:
    """An ordinary convolution of stride 1, which is a transposed one as well."""
    if any(s > 1 for s in conv.stride) or (conv.pads and conv.padding_mode != "zeros"):
        raise FoldError(
            f"cannot {verb} {conv!r} with a transposed convolution: only a convolution of stride 1, padded by zeros or "
            "not at all, is a transposed convolution too; keep them apart"
        )
    flat = conv.promote(rank)
    return from_spread_input(flat, flat.stride, _mirrored(flat))


def _gain(conv: AffineConvTranspose) -> tuple[int, ...]:
    """What an output side has more than the strided input."""
    return tuple(r - sum(pair) for r, pair in zip(conv.reach, conv.padding, strict=True))


def _mirrored(conv: AnyConv, room: int = 0) -> tuple[Pair, ...]:
    """What an ordinary convolution pads and its transposed form cuts add up to its reach: one from the other."""
    sides = zip(conv.reach, conv.padding, strict=True)
    return tuple((r - before + room, r - after + room) for r, (before, after) in sides)
