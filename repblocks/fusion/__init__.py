"""The algebra of convolutions: values, their arithmetic, and `fold` from modules to values."""

from repblocks.fusion.affine_conv import AffineConv
from repblocks.fusion.constructors import (
    average,
    dirac,
    from_adaptive_pool,
    from_batch_norm,
    from_flattened_linear,
    from_linear,
    from_pool,
    identity,
    scale,
    to_linear,
)
from repblocks.fusion.containers import Concat, SplitConcat, Sum
from repblocks.fusion.cost import macs
from repblocks.fusion.fold import fold
from repblocks.fusion.matrix import to_matrix
from repblocks.fusion.shortcut import ELEMENTWISE, absorb_shortcut
from repblocks.fusion.transposed import AffineConvTranspose
from repblocks.fusion.verbs import add, compose, concat, interleave, pad_kernel, pad_with_bias, split_concat, ungroup

__all__ = [
    "ELEMENTWISE",
    "AffineConv",
    "AffineConvTranspose",
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
    "from_adaptive_pool",
    "from_batch_norm",
    "from_flattened_linear",
    "from_linear",
    "from_pool",
    "identity",
    "interleave",
    "macs",
    "pad_kernel",
    "pad_with_bias",
    "scale",
    "split_concat",
    "to_linear",
    "to_matrix",
    "ungroup",
]
