"""What a value costs to apply."""

import math
from collections.abc import Sequence

from repblocks.errors import FoldError
from repblocks.fusion.matrix import output_size
from repblocks.fusion.transposed import AffineConvTranspose, AnyConv


def macs(conv: AnyConv, input_size: Sequence[int]) -> int:
    """Multiply-accumulates of one image: of two exact forms, the one with fewer is the cheaper.

    Every tap of every output pixel (transposed: of every input pixel) counts, those on padding as well, as torch's
    FLOP counter does at two FLOPs per multiply-accumulate. The bias is free.

    Args:
        conv: Ordinary or transposed.
        input_size: Of the image's spatial dims; ``()`` for a vector into a map without spatial dims.

    Raises:
        FoldError: The convolution is not defined on the size.
    """
    if isinstance(conv, AffineConvTranspose):
        _require_upsampled(conv, input_size)
        return math.prod(input_size) * conv.weight.numel()
    return math.prod(output_size(conv, input_size)) * conv.weight.numel()


def _require_upsampled(conv: AffineConvTranspose, input_size: Sequence[int]) -> None:
    size = tuple(input_size)
    if len(size) != conv.rank or any(n < 1 for n in size):
        raise FoldError(f"got input_size={size} for {conv!r}; needed {conv.rank} sizes of at least 1")
    dims = zip(size, conv.stride, conv.reach, conv.padding, strict=True)
    written = tuple((n - 1) * s + reach + 1 - sum(pair) for n, s, reach, pair in dims)
    if any(n < 1 for n in written):
        raise FoldError(
            f"got input_size={size} for {conv!r}, whose padding cuts off all that it writes, leaving {written}; "
            "give a larger input or pad less"
        )
