"""Names and shapes of the weights in RepGhost's own repository."""

from collections.abc import Iterator

import torch
from torch import Tensor

# The repository's own model, told by what its file says rather than by our rules: per group of bottlenecks the kernel
# size of the depthwise convolution, then for each bottleneck hidden channels, channels and whether there is SE.
OFFICIAL = [
    (3, [(8, 16, False)]),
    (3, [(24, 24, False)]),
    (3, [(36, 24, False)]),
    (5, [(36, 40, True)]),
    (5, [(60, 40, True)]),
    (3, [(120, 80, False)]),
    (3, [(100, 80, False), (120, 80, False), (120, 80, False), (240, 112, True), (336, 112, True)]),
    (5, [(336, 160, True)]),
    (5, [(480, 160, False), (480, 160, True), (480, 160, False), (480, 160, True)]),
]
STRIDED_GROUPS = {1, 3, 5, 7}

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def official_shapes(width: float, form: str) -> Shapes:
    channels = rounded(16 * width)
    yield "conv_stem.weight", (channels, 3, 3, 3)
    yield from norm("bn1", channels)
    for group, (kernel, members) in enumerate(OFFICIAL):
        for i, (hidden, out, gated) in enumerate(members):
            sizes = channels, rounded(hidden * width), rounded(out * width)
            for key, shape in bottleneck(*sizes, kernel, form, strided=group in STRIDED_GROUPS, gated=gated):
                yield f"blocks.{group}.{i}.{key}", shape
            channels = sizes[-1]
    last = rounded(2 * 480 * width)
    yield "blocks.9.0.conv.weight", (last, channels, 1, 1)
    yield from norm("blocks.9.0.bn1", last)
    yield from biased("conv_head", 1280, last, 1, 1)
    yield from biased("classifier", 1000, 1280)


def bottleneck(reads: int, hidden: int, out: int, kernel: int, form: str, *, strided: bool, gated: bool) -> Shapes:
    yield from ghost("ghost1", reads, hidden, form)
    if strided:
        yield "conv_dw.weight", (hidden, 1, kernel, kernel)
        yield from norm("bn_dw", hidden)
    if gated:
        squeezed = rounded(hidden / 4)
        yield from biased("se.conv_reduce", squeezed, hidden, 1, 1)
        yield from biased("se.conv_expand", hidden, squeezed, 1, 1)
    yield from ghost("ghost2", hidden, out, form)
    if strided or reads != out:
        yield "shortcut.0.weight", (reads, 1, kernel, kernel)
        yield from norm("shortcut.1", reads)
        yield "shortcut.2.weight", (out, reads, 1, 1)
        yield from norm("shortcut.3", out)


def ghost(name: str, reads: int, out: int, form: str) -> Shapes:
    yield f"{name}.primary_conv.0.weight", (out, reads, 1, 1)
    yield from norm(f"{name}.primary_conv.1", out)
    if form == "deploy":
        yield from biased(f"{name}.cheap_operation", out, 1, 3, 3)
    else:
        yield from norm(f"{name}.fusion_bn.0", out)
        yield f"{name}.cheap_operation.0.weight", (out, 1, 3, 3)
        yield from norm(f"{name}.cheap_operation.1", out)


def norm(name: str, channels: int) -> Shapes:
    yield from ((f"{name}.{key}", (channels,)) for key in ("weight", "bias", "running_mean", "running_var"))
    yield f"{name}.num_batches_tracked", ()


def biased(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def rounded(channels: float) -> int:
    """The nearest multiple of 4 that is not more than a tenth below."""
    nearest = max(4, int(channels + 2) // 4 * 4)
    return nearest + 4 * (nearest < 0.9 * channels)


def official_weights(width: float, form: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.rand(shape, generator=generator, dtype=torch.float64) if shape else torch.tensor(3)
        for key, shape in official_shapes(width, form)
    }
