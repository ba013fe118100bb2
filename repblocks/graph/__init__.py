"""Arbitrary models: collapse what is linear in them, expand what is plain, and contract that again."""

from repblocks.graph.collapse import Collapsed, collapse
from repblocks.graph.contract import contract
from repblocks.graph.expand import Expanded, expand
from repblocks.graph.expanded import ExpandedConv
from repblocks.graph.report import CollapseReport

__all__ = ["CollapseReport", "Collapsed", "Expanded", "ExpandedConv", "collapse", "contract", "expand"]
