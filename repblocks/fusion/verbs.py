"""The public verbs of the algebra, over ordinary and transposed convolutions alike."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import overload

from repblocks.fusion import kernels, transposed_kernels
from repblocks.fusion.affine_conv import AffineConv
from repblocks.fusion.constructors import identity
from repblocks.fusion.geometry import Pair
from repblocks.fusion.transposed import AffineConvTranspose, AnyConv


@overload
def add(*convs: AffineConv) -> AffineConv: ...
@overload
def add(*convs: AnyConv) -> AnyConv: ...
def add(*convs: AnyConv) -> AnyConv:
    """Merge parallel branches: ``add(a, b)(x) == a(x) + b(x)``.

    Kernels are aligned by the positions of their taps and zero-padded to the widest (seed 001, paradigms 2, 4, 6a).
    Groups become the greatest common divisor of the branches'. Beside transposed branches, ordinary ones of stride 1
    count as transposed.

    Args:
        convs: Branches over one input, weights ``[O, I / groups, *kernel_size]``, transposed ``[I, O / groups, ...]``.

    Raises:
        FoldError: Channels, strides, padding modes or output grids differ.

    Source: Ding et al. 2021, "RepVGG", https://arxiv.org/abs/2101.03697, section 3.3.
    """
    ordinary = _ordinary(convs)
    return (
        kernels.add(*ordinary)
        if ordinary is not None
        else transposed_kernels.merge(kernels.add, convs, "in_channels", "out_channels")
    )


@overload
def concat(*convs: AffineConv) -> AffineConv: ...
@overload
def concat(*convs: AnyConv) -> AnyConv: ...
def concat(*convs: AnyConv) -> AnyConv:
    """Merge branches whose outputs are concatenated: ``concat(a, b)(x) == cat(a(x), b(x))`` along the channels.

    Grouped branches become dense; ``interleave`` keeps groups (seed 001, paradigms 3 and 4).

    Raises:
        FoldError: In channels, strides, padding modes or output grids differ.

    Source: Ding et al. 2021, "Diverse Branch Block", https://arxiv.org/abs/2103.13425, section 3.2.
    """
    ordinary = _ordinary(convs)
    return (
        kernels.concat(*ordinary)
        if ordinary is not None
        else transposed_kernels.merge(kernels.concat, convs, "in_channels")
    )


@overload
def interleave(*convs: AffineConv) -> AffineConv: ...
@overload
def interleave(*convs: AnyConv) -> AnyConv: ...
def interleave(*convs: AnyConv) -> AnyConv:
    """Merge ``n`` branches channel by channel: ``interleave(*convs)(x)[:, j::n] == convs[j](x)``.

    Equal to ``concat`` up to that order, but grouped and depthwise branches stay grouped (seed 001, paradigm 6b).

    Raises:
        FoldError: Channels, strides, padding modes or output grids differ.

    Source: seed of the project, "Shortcut re-parameterization", 6b.
    """
    ordinary = _ordinary(convs)
    if ordinary is not None:
        return kernels.interleave(*ordinary)
    return transposed_kernels.merge(kernels.interleave, convs, "in_channels", "out_channels")


@overload
def split_concat(*convs: AffineConv) -> AffineConv: ...
@overload
def split_concat(*convs: AnyConv) -> AnyConv: ...
def split_concat(*convs: AnyConv) -> AnyConv:
    """Merge branches that each read their own slice of the channels, in order, and whose outputs are concatenated.

    ``split_concat(a, b)(cat(x, y)) == cat(a(x), b(y))``: the kernel is block-diagonal, with the finest groups
    that the blocks allow.

    Raises:
        FoldError: Strides, padding modes or output grids differ.

    Source: seed of the project, RepUnit's channel-split form.
    """
    ordinary = _ordinary(convs)
    return (
        kernels.split_concat(*ordinary)
        if ordinary is not None
        else transposed_kernels.merge(kernels.split_concat, convs)
    )


@overload
def compose(first: AffineConv, second: AffineConv) -> AffineConv: ...
@overload
def compose(first: AffineConvTranspose, second: AnyConv) -> AffineConvTranspose: ...
@overload
def compose(first: AnyConv, second: AffineConvTranspose) -> AffineConvTranspose: ...
@overload
def compose(first: AnyConv, second: AnyConv) -> AnyConv: ...
def compose(first: AnyConv, second: AnyConv) -> AnyConv:
    """Merge a chain: ``compose(first, second)(x) == second(first(x))``.

    Seed 001's paradigms 1, 5a, 5b and 8, and two kernels of any size: of ordinary convolutions the merged reach is
    ``d1 (k1 - 1) + s1 d2 (k2 - 1)``, the stride ``s1 s2``. The groups are ``gcd(g1, g2)``, which is the finest
    structure of the product. With a transposed convolution in the chain, the ordinary one must have stride 1.

    Raises:
        FoldError: Channels differ; or the output of ``first`` has a border that no padding of the input reproduces
            in ``second``: zeros after a bias or after a kernel that does not cover the border; reflect, replicate or
            circular after anything but an unpadded pointwise convolution; a bias before upsampling; pixels
            that a transposed ``first`` cuts off and ``second`` would see.

    Source: Ding et al. 2021, "Diverse Branch Block", https://arxiv.org/abs/2103.13425, section 3.2, transform III.
    """
    if isinstance(first, AffineConv) and isinstance(second, AffineConv):
        return kernels.compose(first, second)
    return transposed_kernels.chain(first, second)


@overload
def pad_kernel(conv: AffineConv, kernel_size: int | Sequence[int]) -> AffineConv: ...
@overload
def pad_kernel(conv: AffineConvTranspose, kernel_size: int | Sequence[int]) -> AffineConvTranspose: ...
def pad_kernel(conv: AnyConv, kernel_size: int | Sequence[int]) -> AnyConv:
    """Grow a kernel by zero taps to ``kernel_size``: ``pad_kernel(conv, kernel_size)(x) == conv(x)``.

    Padding grows with it, as evenly as the old padding allows; odd, even and rectangular sizes (seed 001, paradigm 4).
    Reflect and circular padding of the new width need an input at least that large.

    Raises:
        FoldError: A side of ``kernel_size`` is smaller than the kernel's, or their numbers differ.

    Source: Ding et al. 2021, "RepVGG", https://arxiv.org/abs/2101.03697, section 3.3.
    """
    if isinstance(conv, AffineConv):
        return kernels.pad_kernel(conv, kernel_size)
    return transposed_kernels.lent(partial(kernels.pad_kernel, kernel_size=kernel_size), conv)


@overload
def ungroup(conv: AffineConv, groups: int) -> AffineConv: ...
@overload
def ungroup(conv: AffineConvTranspose, groups: int) -> AffineConvTranspose: ...
def ungroup(conv: AnyConv, groups: int) -> AnyConv:
    """The same convolution in fewer groups: ``ungroup(conv, groups)(x) == conv(x)``, zeros across old groups.

    Raises:
        FoldError: ``groups`` does not divide ``conv.groups``.

    Source: seed 001 of the project, paradigm 5, where the convolutions of a chain have groups.
    """
    if isinstance(conv, AffineConv):
        return kernels.ungroup(conv, groups)
    return transposed_kernels.lent(partial(kernels.ungroup, groups=groups), conv)


def pad_with_bias(conv: AffineConv, padding: tuple[Pair, ...]) -> AffineConv:
    """A convolution whose output is padded by its own image of zero: ``pad(conv(x) - b) + b``, ``b`` its bias.

    So a bias or BatchNorm, then padding, folds into a padded convolution, as zero padding in its place never does (the
    border of seed 001, paradigm 5a). Of a pointwise ``conv`` it is ``conv`` of the zero-padded input.

    Args:
        conv: Any that gives its bias by itself beyond the border, as an unpadded pointwise one of stride 1 does.
        padding: ``(before, after)`` per spatial dim of the output.

    Raises:
        FoldError: Beyond the border, ``conv`` would still see the input.

    Source: Ding et al. 2021, "Diverse Branch Block", https://arxiv.org/abs/2103.13425, section 3.2.
    """
    border = replace(identity(conv.out_channels, dtype=conv.weight.dtype).promote(len(padding)), padding=padding)
    linear = replace(conv, bias=None)
    return replace(kernels.compose(linear, border.to(conv.weight.device)), bias=conv.bias)


def _ordinary(convs: Sequence[AnyConv]) -> list[AffineConv] | None:
    """The branches if all are ordinary, also if there are none; None if any is transposed."""
    ordinary = [conv for conv in convs if isinstance(conv, AffineConv)]
    return ordinary if len(ordinary) == len(convs) else None
