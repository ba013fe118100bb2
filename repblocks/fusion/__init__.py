"""The algebra of convolutions: values, their arithmetic, and `fold` from modules to values."""

from repblocks.fusion.affine_conv import AffineConv
from repblocks.fusion.constructors import (
    average,
    dirac,
    from_batch_norm,
    from_linear,
    from_pool,
    identity,
    scale,
    to_linear,
)
from repblocks.fusion.containers import Concat, SplitConcat, Sum
from repblocks.fusion.fold import fold
from repblocks.fusion.kernels import add, compose, concat, interleave, pad_kernel, split_concat, ungroup
from repblocks.fusion.shortcut import ELEMENTWISE, absorb_shortcut

__all__ = [
    "ELEMENTWISE",
    "AffineConv",
    "Concat",
    "SplitConcat",
    "Sum",
    "absorb_shortcut",
    "add",
    "average",
    "compose",
    "concat",
    "dirac",
    "fold",
    "from_batch_norm",
    "from_linear",
    "from_pool",
    "identity",
    "interleave",
    "pad_kernel",
    "scale",
    "split_concat",
    "to_linear",
    "ungroup",
]
