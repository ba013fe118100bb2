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
    Concat,
    SplitConcat,
    Sum,
    absorb_shortcut,
    add,
    compose,
    concat,
    fold,
    interleave,
    pad_kernel,
    split_concat,
    ungroup,
)
from repblocks.models import create_model, list_models
from repblocks.profiling import profile
from repblocks.verification import EquivalenceReport, verify

__version__ = version("repblocks")

__all__ = [
    "BLOCKS",
    "ACConv",
    "AffineConv",
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
    "list_models",
    "load",
    "pad_kernel",
    "profile",
    "register_block",
    "save",
    "split_concat",
    "switch_to_deploy",
    "ungroup",
    "verify",
]
