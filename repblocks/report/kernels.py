"""What a kernel looks like: where its energy is, and its singular values."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repblocks.fusion import AffineConv
from repblocks.report.words import size


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFacts:
    """One collapsed convolution.

    Attributes:
        name: Its place in the model.
        text: The convolution in words.
        taps: Share of the squared weights by row and column of the kernel; in total 1, or all 0 for a zero kernel.
        singular_values: Of the map from one patch of the input to one pixel of the output, descending.
    """

    name: str
    text: str
    taps: tuple[tuple[float, ...], ...]
    singular_values: tuple[float, ...]


def kernel_facts(name: str, conv: AffineConv) -> KernelFacts:
    """Look at a convolution of at most two spatial dims."""
    plane = replace(conv, weight=conv.weight.detach().cpu().double(), bias=None).promote(2)
    return KernelFacts(
        name=name,
        text=in_words(plane),
        taps=tuple(tuple(row) for row in tap_energy(plane.weight).tolist()),
        singular_values=tuple(patch_spectrum(plane).tolist()),
    )


def in_words(conv: AffineConv) -> str:
    """Kernel size, channels, and what is not ordinary about them."""
    groups = "" if conv.groups == 1 else "depthwise " if conv.groups == conv.in_channels else f"{conv.groups} groups "
    stride = "" if set(conv.stride) == {1} else f", stride {_short(conv.stride)}"
    dilation = "" if set(conv.dilation) == {1} else f", dilation {_short(conv.dilation)}"
    return f"{groups}{size(conv.kernel_size)} conv, {conv.in_channels} → {conv.out_channels}{stride}{dilation}"


def _short(sides: tuple[int, ...]) -> str:
    return str(sides[0]) if len(set(sides)) == 1 else size(sides)


def tap_energy(weight: Tensor) -> Tensor:
    """``[O, I / groups, H, W]`` to each tap's share of the squared weights, ``[H, W]``."""
    energy = weight.square().sum(dim=(0, 1))
    return energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)


def patch_spectrum(conv: AffineConv) -> Tensor:
    """All singular values of ``weight`` as a map from a patch to a pixel, those of the groups together: descending.

    They are `repblocks.spectrum` on an input as large as the kernel, for all groups at once, and as the roots of the
    eigenvalues of the smaller product of the matrix with itself: many times faster for large layers, and exact to
    1e-8 of the largest, more than a picture shows. On a whole map the patches overlap, and a value depends on the
    map's size and padding; these are the kernel's own.
    """
    matrices = conv.weight.reshape(conv.groups, conv.out_channels // conv.groups, -1)
    matrices = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    squares = torch.linalg.eigvalsh(matrices @ matrices.mT)
    return squares.clamp_min(0).sqrt().flatten().sort(descending=True).values
