"""Blocks with a train form of many branches and an equal, plain deploy form."""

from repblocks.blocks.acnet import ACConv
from repblocks.blocks.base import BranchConv, RepBlock, RepConv, deployed, form_of, switch_to_deploy
from repblocks.blocks.bn_conv import BNConv
from repblocks.blocks.conv_bn import ConvBN
from repblocks.blocks.csla import CSLAConv
from repblocks.blocks.dbb import DBBConv
from repblocks.blocks.dilated import DilatedRepConv
from repblocks.blocks.edge import EdgeConv
from repblocks.blocks.execution import BlockExecution, ExecutionPlan, execution_plan, set_execution
from repblocks.blocks.expand import ExpandConv
from repblocks.blocks.largekernel import LargeKernelConv
from repblocks.blocks.mobileone import MobileOneConv
from repblocks.blocks.norm_linear import NormLinear
from repblocks.blocks.orepa import OREPAConv
from repblocks.blocks.qarepvgg import QARepVGGConv
from repblocks.blocks.registry import BLOCKS, options_of, register_block, resolve_block
from repblocks.blocks.repghost import RepGhostModule
from repblocks.blocks.repmixer import RepMixer
from repblocks.blocks.repnext import RepNeXtBlock
from repblocks.blocks.repnextm import RepNeXtMConv
from repblocks.blocks.repnextm_small import RepNeXtMSmallConv
from repblocks.blocks.repunit import RepUnit
from repblocks.blocks.repvgg import RepVGGConv
from repblocks.blocks.repvgg_block import RepVGGBlock
from repblocks.blocks.repvit import RepViTConv
from repblocks.blocks.shares import branch_shares

__all__ = [
    "BLOCKS",
    "ACConv",
    "BNConv",
    "BlockExecution",
    "BranchConv",
    "CSLAConv",
    "ConvBN",
    "DBBConv",
    "DilatedRepConv",
    "EdgeConv",
    "ExecutionPlan",
    "ExpandConv",
    "LargeKernelConv",
    "MobileOneConv",
    "NormLinear",
    "OREPAConv",
    "QARepVGGConv",
    "RepBlock",
    "RepConv",
    "RepGhostModule",
    "RepMixer",
    "RepNeXtBlock",
    "RepNeXtMConv",
    "RepNeXtMSmallConv",
    "RepUnit",
    "RepVGGBlock",
    "RepVGGConv",
    "RepViTConv",
    "branch_shares",
    "deployed",
    "execution_plan",
    "form_of",
    "options_of",
    "register_block",
    "resolve_block",
    "set_execution",
    "switch_to_deploy",
]
