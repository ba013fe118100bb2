"""Arbitrary models: read their graph, and collapse what is linear in it.

A tensor's way: `tracing` a flat graph, `rules` what each operation means for the `forms` of its result, `plan` the
cheapest way through a region, `edits` and `rewriting` of a copy, `proof` that it equals the model.
"""

from repblocks.graph.collapse import Collapsed, collapse
from repblocks.graph.report import CollapseReport

__all__ = ["CollapseReport", "Collapsed", "collapse"]
