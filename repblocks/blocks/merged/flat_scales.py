"""Norms of explicit outputs, summed, and a norm of such a sum: one channel at a time, written out."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repblocks.blocks.merged.norm_terms import NormTerms
from repblocks.blocks.merged.programs import Gradients, Program, Pull
from repblocks.blocks.merged.statistics import Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """A sum over explicit outputs: ``sum_i norm_i(w_i f_k(i))``, w_i a factor per channel.

    Attributes:
        norms: One per summand; None where a summand has none.
        reads: Index of the output that each reads.
        factors: Depthwise 1x1 convolutions in front of the norms, None where there is none.
        outputs: How many outputs there are.
        outer: The norm behind the sum, None where there is none.
    """

    norms: tuple[nn.BatchNorm2d | None, ...]
    reads: tuple[int, ...]
    factors: tuple[nn.Conv2d | None, ...]
    outputs: int
    outer: nn.BatchNorm2d | None = None

    @property
    def inner(self) -> list[nn.BatchNorm2d]:
        """The norms of the summands that have one."""
        return [norm for norm in self.norms if norm is not None]

    @property
    def parameters(self) -> list[Tensor | None]:
        """What receives gradients, in the order of the programs' ``gradients``."""
        convs = [conv for conv in self.factors if conv is not None]
        own: list[Tensor | None] = [*(conv.weight for conv in convs), *(conv.bias for conv in convs)]
        outer = [] if self.outer is None else NormTerms.parameters([self.outer])
        return [*own, *NormTerms.parameters(self.inner), *outer]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Of the factors."""
        return tuple(conv.weight for conv in self.factors if conv is not None)

    def factors_from(self, weights: Sequence[Tensor]) -> Tensor | None:
        """w, ``[T, C]``, ones where there is no convolution; None where there is none at all."""
        if not weights:
            return None
        given, ones = iter(weights), weights[0].new_ones(len(weights[0]))
        return torch.stack([ones if conv is None else next(given).flatten() for conv in self.factors])

    def read(self, of_outputs: Tensor) -> Tensor:
        """``[T, C]``: for each summand, what belongs to the output that it reads."""
        return of_outputs if self._one_each else self._selection(of_outputs) @ of_outputs

    def summed(self, terms: Tensor) -> Tensor:
        """``[T, C]`` summed over the summands that read one output: ``[K, C]``."""
        return terms if self._one_each else self._selection(terms).t() @ terms

    @property
    def _one_each(self) -> bool:
        return self.reads == tuple(range(self.outputs))

    def _selection(self, like: Tensor) -> Tensor:
        return _selection(self.reads, self.outputs, like.dtype, like.device)

    def gradients_of_factors(self, gradients: Tensor) -> Gradients:
        """Of the factors' weights from ``[T, C]``, and of their biases, which the norms take out again: zeros."""
        found = [(conv, g) for conv, g in zip(self.factors, gradients.unbind(), strict=True) if conv is not None]
        weights = [gradient.view(conv.weight.shape) for conv, gradient in found]
        return [*weights, *(None if conv.bias is None else torch.zeros_like(conv.bias) for conv, _ in found)]


@functools.lru_cache(maxsize=64)
def _selection(reads: tuple[int, ...], outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[T, K]``: 1 where a summand reads an output."""
    matrix = torch.zeros(len(reads), outputs, dtype=dtype, device=device)
    matrix[torch.arange(len(reads)), torch.tensor(reads)] = 1
    return matrix


class FlatScales(Program):
    """``sum_i norm_i(w_i f_k(i))``: weight ``[C, 1, K]``; see `Scales`."""

    def __init__(self, scales: Scales) -> None:
        self.scales = scales

    def forward(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Weight and bias."""
        mean, variance = self.scales.read(moments.mean.t()), self.scales.read(moments.variance.t())
        self.saved = self.scales.weights
        factors = self.scales.factors_from(self.saved)
        if factors is not None:
            mean, variance = factors * mean, factors * factors * variance
        biases = [None if conv is None else conv.bias for conv in self.scales.factors]
        self.terms = NormTerms(self.scales.inner, mean, variance, biases, moments.count)
        self.weight = self.scales.summed(self.terms.scale if factors is None else factors * self.terms.scale)
        return self.weight.t().unsqueeze(1), self.terms.shift

    def backward(self, moments: Moments, saved: Sequence[Tensor], dweight: Tensor, dbias: Tensor) -> Pull:
        """Gradients of moments and parameters."""
        centred = self.scales.read(dweight.squeeze(1).t() - moments.mean.t() * dbias)
        factors = self.scales.factors_from(saved)
        curvature, norm_gradients = self.terms.backward(centred if factors is None else factors * centred, dbias)
        own: Gradients = []
        if factors is not None:
            variance = self.scales.read(moments.variance.t())
            own = self.scales.gradients_of_factors(
                self.terms.scale * centred + moments.count * curvature * factors * variance
            )
            curvature = curvature * factors * factors
        self.gradients = [*own, *norm_gradients]
        return Pull(-(self.weight * dbias).t(), self.scales.summed(curvature).t())


class NormedScales(Program):
    """``norm(sum_i t_i)`` with ``t_i = norm_i(f_k(i))`` or ``t_i = w_i f_k(i)``: RepViT's and QARepVGG's blocks.

    With the sum's weight ``alpha [K, C]``, ``v = alpha R alpha^T`` and ``s = gamma / sqrt(v + eps)``, the merged weight
    is ``s alpha``. Shifts inside the sum are taken out again by the norm behind it.
    """

    def __init__(self, scales: Scales) -> None:
        assert scales.outer is not None
        self.scales, self.outer_norm = scales, scales.outer
        self.normed = [i for i, norm in enumerate(scales.norms) if norm is not None]

    def forward(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Weight and bias."""
        mean, count = moments.mean.t(), moments.count
        self.saved = self.scales.weights
        coefficients = self.scales.factors_from(self.saved)
        if coefficients is None:
            coefficients = mean.new_ones(len(self.scales.reads), mean.shape[1])
        shift = sum(conv.bias for conv in self.scales.factors if conv is not None and conv.bias is not None)
        self.inner = None
        if self.normed:
            means, variances = (self.scales.read(t)[self.normed] for t in (mean, moments.variance.t()))
            self.inner = NormTerms(self.scales.inner, means, variances, [None] * len(self.normed), count)
            coefficients[self.normed] = self.inner.scale
            shift = shift + self.inner.shift
        self.alpha = self.scales.summed(coefficients)
        self.spread = (moments.covariance @ self.alpha.t().unsqueeze(-1)).squeeze(-1).t()
        variance = (self.alpha * self.spread).sum(0, keepdim=True).clamp_min_(0)
        biases = [shift if isinstance(shift, Tensor) else None]
        self.outer = NormTerms([self.outer_norm], (self.alpha * mean).sum(0, keepdim=True), variance, biases, count)
        return (self.outer.scale * self.alpha).t().unsqueeze(1), self.outer.shift

    def backward(self, moments: Moments, saved: Sequence[Tensor], dweight: Tensor, dbias: Tensor) -> Pull:
        """Gradients of moments and parameters."""
        centred = dweight.squeeze(1).t() - moments.mean.t() * dbias
        bend, outer_gradients = self.outer.backward((self.alpha * centred).sum(0, keepdim=True), dbias)
        dterms = self.scales.read(self.outer.scale * centred + moments.count * bend * self.spread)
        curvature = (bend * self.alpha).t().unsqueeze(2) * self.alpha.t().unsqueeze(1)
        inner_gradients: Gradients = []
        if self.inner is not None:
            bends, inner_gradients = self.inner.backward(dterms[self.normed], torch.zeros_like(dbias))
            own = torch.zeros_like(dterms)
            own[self.normed] = bends
            curvature.diagonal(dim1=1, dim2=2).add_(self.scales.summed(own).t())
        self.gradients = [*self.scales.gradients_of_factors(dterms), *inner_gradients, *outer_gradients]
        return Pull(-(self.outer.scale * self.alpha * dbias).t(), curvature)
