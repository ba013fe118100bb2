"""What other repositories call the weights of our networks: one file for each family."""

from repblocks.foreign.rules import Names, Rules, ours_from_theirs, theirs_from_ours

__all__ = ["Names", "Rules", "ours_from_theirs", "theirs_from_ours"]
