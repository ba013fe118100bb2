"""Norms of linear maps of the patches, summed: MobileOne's, RepVGG's and ACNet's blocks, written out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from repblocks.blocks.merged.layout import add_symmetric_, mirrored
from repblocks.blocks.merged.norm_terms import NormTerms
from repblocks.blocks.merged.programs import Program, Pull
from repblocks.blocks.merged.statistics import Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Where the kernels of flat branches lie among the entries of the merged one.

    Attributes:
        convs: Convolutions of ``norm(conv(x))``.
        conv_norms: Their norms.
        identity_norms: Norms of the input itself.
        shape: Of the merged weight, ``(groups, O / groups, P)``.
        places: For each convolution the entry of the merged weight for each entry of its own; None where they agree.
        diagonal: For each channel the entry of the merged weight that copies it; empty without identity.
        columns: For each channel the entry of a mean ``[groups, P]`` that its identity reads.
        squares: For each channel the diagonal entry of a curvature ``[groups, P, P]`` that belongs to its identity.
    """

    convs: tuple[nn.Conv2d, ...]
    conv_norms: tuple[nn.BatchNorm2d, ...]
    identity_norms: tuple[nn.BatchNorm2d, ...]
    shape: tuple[int, int, int]
    places: tuple[Tensor | None, ...]
    diagonal: Tensor
    columns: Tensor
    squares: Tensor

    @property
    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """Of all summands, the convolutions first."""
        return (*self.conv_norms, *self.identity_norms)

    @property
    def parameters(self) -> list[Tensor | None]:
        """What receives gradients, in the order of `FlatRows.gradients`."""
        weights, biases = [conv.weight for conv in self.convs], [conv.bias for conv in self.convs]
        return [*weights, *biases, *NormTerms.parameters(self.norms)]

    def to(self, device: torch.device) -> "Rows":
        """The same with its indices on another device."""
        places = tuple(None if place is None else place.to(device) for place in self.places)
        indices = {name: getattr(self, name).to(device) for name in ("diagonal", "columns", "squares")}
        return replace(self, places=places, **indices)

    def stacked(self, weights: Sequence[Tensor]) -> Tensor:
        """Kernels of the convolutions as rows ``[groups, n * O / groups, P]``."""
        groups, _, taps = self.shape
        kernels = [self._placed(weight, place) for weight, place in zip(weights, self.places, strict=True)]
        return torch.stack(kernels, 1).reshape(groups, -1, taps)

    def _placed(self, weight: Tensor, place: Tensor | None) -> Tensor:
        if place is None:
            return weight.reshape(self.shape)
        return weight.new_zeros(self.shape).flatten().index_copy_(0, place, weight.flatten()).view(self.shape)

    def own_entries(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the convolutions' own weights from those of the merged weight's entries."""
        return [
            (gradient.flatten() if place is None else gradient.flatten()[place]).view(conv.weight.shape)
            for conv, place, gradient in zip(self.convs, self.places, gradients, strict=True)
        ]


class FlatRows(Program):
    """``sum_i norm_i(w_i u) + sum_j norm_j(u)`` over patches u, written out.

    With ``s_i = gamma_i / sqrt(v_i + eps)``, ``v_i = w_i R w_i^T`` and ``G_c`` the gradient of the merged weight,
    centred: ``dgamma_i = (w_i . G_c) / sqrt(v_i + eps)``, ``a_i = -s_i dgamma_i / (M sqrt(v_i + eps))``,
    ``dw_i = s_i G_c + M a_i w_i R``, ``curvature = sum_i w_i^T a_i w_i``.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def forward(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Weight and bias."""
        weights = [conv.weight for conv in self.rows.convs]
        rows = self.rows.stacked(weights)
        spread = rows @ moments.covariance
        variance = self._terms((spread * rows).sum(-1), moments.variance.flatten())
        mean = self._terms((rows @ moments.mean.unsqueeze(-1)).squeeze(-1), moments.mean.flatten())
        biases = [*(conv.bias for conv in self.rows.convs), *(None for _ in self.rows.identity_norms)]
        self.terms = NormTerms(self.rows.norms, mean, variance.clamp_min_(0), biases, moments.count)
        self.saved = (spread, *weights)
        self.weight = self._weight(rows)
        return self.weight, self.terms.shift

    def _terms(self, of_rows: Tensor, of_columns: Tensor) -> Tensor:
        """``[T, O]`` from what rows ``[groups, n * O / groups]`` and identities (``[groups * P]``) give."""
        groups, out, _ = self.rows.shape
        terms = of_rows.view(groups, -1, out).transpose(0, 1).flatten(1)
        if not self.rows.identity_norms:
            return terms.contiguous()
        read = of_columns[self.rows.columns].unsqueeze(0)
        return torch.cat([terms, read.expand(len(self.rows.identity_norms), -1)])

    def _by_rows(self, terms: Tensor) -> Tensor:
        """The inverse of `_terms` for the rows, ``[groups, n, O / groups, 1]``."""
        groups, out, _ = self.rows.shape
        return terms[: len(self.rows.convs)].view(-1, groups, out).transpose(0, 1).unsqueeze(-1)

    def _weight(self, rows: Tensor) -> Tensor:
        groups, out, taps = self.rows.shape
        scale = self._by_rows(self.terms.scale)
        by_row = rows.view(groups, -1, out, taps)
        weight = scale.view(groups, 1, -1) @ rows if out == 1 else (scale * by_row).sum(1)
        if self.rows.identity_norms:
            copies = self.terms.scale[len(self.rows.convs) :].sum(0)
            weight.view(-1).index_add_(0, self.rows.diagonal, copies)
        return weight

    def backward(self, moments: Moments, saved: Sequence[Tensor], dweight: Tensor, dbias: Tensor) -> Pull:
        """Gradients of moments and parameters."""
        groups, out, taps = self.rows.shape
        stacked = self.rows.stacked(saved[1:])
        rows, spread = (t.view(groups, -1, out, taps) for t in (stacked, saved[0]))
        centred = dweight - dbias.view(groups, out, 1) * moments.mean.unsqueeze(1)
        of_identities = centred.flatten()[self.rows.diagonal].unsqueeze(0) if self.rows.identity_norms else dbias
        along = (stacked @ centred.mT).unsqueeze(2) if out == 1 else (rows * centred.unsqueeze(1)).sum(-1)
        dscale = along.transpose(0, 1).flatten(1)
        if self.rows.identity_norms:
            dscale = torch.cat([dscale, of_identities.expand(len(self.rows.identity_norms), -1)])
        curvature, norm_gradients = self.terms.backward(dscale, dbias)
        bent = self._by_rows(curvature)
        drows = torch.addcmul(self._by_rows(self.terms.scale) * centred.unsqueeze(1), bent * self.terms.count, spread)
        convs = self.rows.own_entries(list(drows.unbind(1)))
        nothing = [None if conv.bias is None else torch.zeros_like(conv.bias) for conv in self.rows.convs]
        self.gradients = [*convs, *nothing, *norm_gradients]
        matrix = _symmetric(stacked, (bent * rows).reshape(groups, -1, taps))
        if self.rows.identity_norms:
            matrix.view(-1).index_add_(0, self.rows.squares, curvature[len(self.rows.convs) :].sum(0))
        dmean = -(dbias.view(groups, 1, out) @ self.weight).squeeze(1)
        return Pull(dmean, matrix)


def _symmetric(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b``, known to be symmetric, for ``[groups, rows, P]``."""
    if len(a) > 1:
        return a.transpose(1, 2) @ b
    return mirrored(add_symmetric_(a.new_zeros(a.shape[2], a.shape[2]), a[0], b[0])).unsqueeze(0)
