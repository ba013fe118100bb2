"""Modules for parallel branches: what `nn.Sequential` is to chains."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from repblocks.errors import FoldError


class Branches(nn.ModuleDict):
    """Abstract: modules side by side, named by the caller or numbered.

    Args:
        branches: Name to module, or modules in order.

    Raises:
        FoldError: There are none.
    """

    def __init__(self, branches: Mapping[str, nn.Module] | Sequence[nn.Module]) -> None:
        named = dict(branches) if isinstance(branches, Mapping) else {str(i): m for i, m in enumerate(branches)}
        if not named:
            raise FoldError(f"{type(self).__name__} needs at least one branch")
        super().__init__(named)


class Sum(Branches):
    """Branches over one input, summed: ``Sum([a, b])(x) == a(x) + b(x)``. Folds by ``add``."""

    def forward(self, x: Tensor) -> Tensor:
        """Run every branch on ``x`` and add the results."""
        first, *others = self.values()
        total: Tensor = first(x)
        for branch in others:
            total = total + branch(x)
        return total


class Concat(Branches):
    """Branches over one input: ``Concat([a, b])(x) == cat([a(x), b(x)], dim=1)``. Folds by ``concat``."""

    def forward(self, x: Tensor) -> Tensor:
        """Run every branch on ``x`` and concatenate the results."""
        return torch.cat([branch(x) for branch in self.values()], dim=1)


class SplitConcat(Branches):
    """Branches that each read their own slice of the channels, outputs concatenated. Folds by ``split_concat``.

    Args:
        branches: Name to module, or modules, in the order of their slices.
        widths: Channels that each branch reads.

    Raises:
        FoldError: There are not as many widths as branches.
    """

    def __init__(self, branches: Mapping[str, nn.Module] | Sequence[nn.Module], widths: Sequence[int]) -> None:
        super().__init__(branches)
        self.widths = tuple(widths)
        if len(self.widths) != len(self):
            raise FoldError(f"got {len(self)} branches and {len(self.widths)} widths; needed one width for each branch")

    def forward(self, x: Tensor) -> Tensor:
        """Run every branch on its slice of ``x`` and concatenate the results."""
        slices = x.split(self.widths, dim=1)
        return torch.cat([branch(part) for branch, part in zip(self.values(), slices, strict=True)], dim=1)
