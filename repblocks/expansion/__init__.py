"""Plain models with multi-branch blocks in the place of their convolutions, and back to the original architecture."""

from repblocks.expansion.contract import contract
from repblocks.expansion.expand import Expanded, expand
from repblocks.expansion.expanded import ExpandedConv

__all__ = ["Expanded", "ExpandedConv", "contract", "expand"]
