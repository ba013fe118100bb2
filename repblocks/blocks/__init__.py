"""Blocks with a train form of many branches and an equal, plain deploy form."""

from repblocks.blocks.acnet import ACConv
from repblocks.blocks.base import BranchConv, RepBlock, RepConv, deployed, form_of, switch_to_deploy
from repblocks.blocks.conv_bn import BNConv, ConvBN
from repblocks.blocks.registry import BLOCKS, register_block, resolve_block
from repblocks.blocks.repnext import RepNeXtBlock
from repblocks.blocks.repunit import RepUnit
from repblocks.blocks.repvgg import RepVGGBlock, RepVGGConv

__all__ = [
    "BLOCKS",
    "ACConv",
    "BNConv",
    "BranchConv",
    "ConvBN",
    "RepBlock",
    "RepConv",
    "RepNeXtBlock",
    "RepUnit",
    "RepVGGBlock",
    "RepVGGConv",
    "deployed",
    "form_of",
    "register_block",
    "resolve_block",
    "switch_to_deploy",
]
