"""Structural re-parameterization as an exact algebra: train many branches, ship the plain convolution they equal.

``import repblocks as rb`` also registers the zoo with timm, under the prefix ``rb_``.
"""

from importlib.metadata import version

from repblocks.blocks import (
    BLOCKS,
    ACConv,
    BNConv,
    BranchConv,
    ConvBN,
    RepBlock,
    RepConv,
    RepNeXtBlock,
    RepUnit,
    RepVGGBlock,
    RepVGGConv,
    deployed,
    form_of,
    register_block,
    switch_to_deploy,
)
from repblocks.checkpoint import load, save
from repblocks.convert import convert
from repblocks.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    FoldError,
    NonFiniteError,
    RepblocksError,
    VerificationError,
)
from repblocks.export import export
from repblocks.fusion import (
    AffineConv,
    AffineConvTranspose,
    Concat,
    SplitConcat,
    Sum,
    absorb_shortcut,
    add,
    compose,
    concat,
    fold,
    interleave,
    macs,
    pad_kernel,
    split_concat,
    to_matrix,
    ungroup,
)
from repblocks.models import create_model, list_models
from repblocks.profiling import profile
from repblocks.spectra import kernel_report, linear_operator, spectral_norm, spectrum
from repblocks.verification import EquivalenceReport, verify

__version__ = version("repblocks")

__all__ = [
    "BLOCKS",
    "ACConv",
    "AffineConv",
    "AffineConvTranspose",
    "BNConv",
    "BranchConv",
    "CheckpointError",
    "Concat",
    "ConfigurationError",
    "ConvBN",
    "DataError",
    "EquivalenceReport",
    "FoldError",
    "NonFiniteError",
    "RepBlock",
    "RepConv",
    "RepNeXtBlock",
    "RepUnit",
    "RepVGGBlock",
    "RepVGGConv",
    "RepblocksError",
    "SplitConcat",
    "Sum",
    "VerificationError",
    "absorb_shortcut",
    "add",
    "compose",
    "concat",
    "convert",
    "create_model",
    "deployed",
    "export",
    "fold",
    "form_of",
    "interleave",
    "kernel_report",
    "linear_operator",
    "list_models",
    "load",
    "macs",
    "pad_kernel",
    "profile",
    "register_block",
    "save",
    "spectral_norm",
    "spectrum",
    "split_concat",
    "switch_to_deploy",
    "to_matrix",
    "ungroup",
    "verify",
]
