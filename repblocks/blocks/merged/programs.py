"""The small arithmetic of a merged block: from moments to the merged weight, and the gradients back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from repblocks.blocks.merged.statistics import Moments

Gradients = list[Tensor | None]


@dataclass(frozen=True, slots=True)
class Pull:
    """Gradients of moments, as they reach the vectors: ``du_t += curvature (u_t - mean) + dmean / M``.

    Attributes:
        dmean: ``[groups, P]``.
        curvature: ``(dR + dR^T) / M``, ``[groups, P, P]``, or its diagonals where nothing else is needed.
    """

    dmean: Tensor
    curvature: Tensor


class Program(ABC):
    """The merged weight ``[groups, O / groups, P]`` and bias ``[O]`` of one forward pass, from its moments."""

    @abstractmethod
    def forward(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Weight and bias; the norms' running statistics move."""

    @abstractmethod
    def backward(self, moments: Moments, saved: Sequence[Tensor], dweight: Tensor, dbias: Tensor) -> Pull:
        """Gradients of the moments; those of the parameters are left in ``gradients``."""

    saved: tuple[Tensor, ...] = ()
    gradients: Gradients
