"""BatchNorms side by side: their scales and shifts from moments, and the gradients back, for all at once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repblocks.blocks.merged.statistics import remember


class NormTerms:
    """Norms of ``T`` summands over ``O`` channels: ``y = sum_i scale_i (z_i - mean_i) + shift_i``.

    Args:
        norms: One per summand.
        means, variances: Of the summands' batch, ``[T, O]``, the means without the biases of convolutions.
        biases: Of the convolutions in front, which only running means see; one per summand or None.
        count: Positions that the statistics are over.
    """

    def __init__(
        self,
        norms: Sequence[nn.BatchNorm2d],
        means: Tensor,
        variances: Tensor,
        biases: Sequence[Tensor | None],
        count: int,
    ) -> None:
        self.norms, self.count = norms, count
        self.inverse_std = (variances + _eps(norms, variances)).rsqrt_()
        gamma, beta = _stacked([norm.weight for norm in norms], 1), _stacked([norm.bias for norm in norms], 0)
        self.scale = self.inverse_std if gamma is None else gamma * self.inverse_std
        shift = -(self.scale * means)
        self.shift = (shift if beta is None else beta + shift).sum(0)
        seen = [m if c is None else m + c for m, c in zip(means.unbind(), biases, strict=True)]
        remember(norms, seen, variances.unbind(), count)

    def backward(self, dscale: Tensor, dshift: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of the variances, as ``a = 2 dv / M``, and of the norms' weights and biases.

        Args:
            dscale: ``[T, O]``, of each summand's scale, its mean being subtracted.
            dshift: ``[O]``, of the common shift.
        """
        dgamma = dscale * self.inverse_std
        curvature = self.scale * dgamma * self.inverse_std / -self.count
        weights = [g if norm.weight is not None else None for norm, g in zip(self.norms, dgamma.unbind(), strict=True)]  # pyright: ignore[reportUnnecessaryComparison]
        biases = [dshift if norm.bias is not None else None for norm in self.norms]  # pyright: ignore[reportUnnecessaryComparison]
        return curvature, [*weights, *biases]

    @staticmethod
    def parameters(norms: Sequence[nn.BatchNorm2d]) -> list[Tensor | None]:
        """The weights, then the biases, in the order of `backward`."""
        return [*(norm.weight for norm in norms), *(norm.bias for norm in norms)]


def _eps(norms: Sequence[nn.BatchNorm2d], like: Tensor) -> float | Tensor:
    values = [norm.eps for norm in norms]
    return values[0] if len(set(values)) == 1 else like.new_tensor(values).unsqueeze(1)


def _stacked(tensors: Sequence[Tensor | None], neutral: float) -> Tensor | None:
    """``[T, O]``, None if all are missing; ``neutral`` is what an affine parameter is that a norm lacks."""
    present = next((tensor for tensor in tensors if tensor is not None), None)
    if present is None:
        return None
    return torch.stack([torch.full_like(present, neutral) if tensor is None else tensor for tensor in tensors])
