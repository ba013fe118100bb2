"""Any tree of sums and chains: its arithmetic is the shared fold, under autograd."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from repblocks.blocks.merged.programs import Program, Pull
from repblocks.blocks.merged.reading import Leaf, Node, Total, is_batch_norm
from repblocks.blocks.merged.statistics import Moments, remember
from repblocks.fusion import AffineConv, add, compose, fold
from repblocks.fusion.constructors import normalisation


class Nested(Program):
    """Any tree of sums and chains, folded by the shared algebra under autograd.

    Args:
        node: The tree.
        values: The value of each leaf over the vector whose moments are given, without spatial dims.
        parameters: What receives gradients.
    """

    def __init__(
        self, node: Node, values: Callable[[Tensor], Mapping[Leaf, AffineConv]], parameters: Sequence[nn.Parameter]
    ) -> None:
        self.node, self.values, self.parameters = node, values, parameters

    def forward(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Weight and bias."""
        self.inputs = [t.detach().requires_grad_() for t in (moments.mean, moments.covariance)]
        with torch.enable_grad():
            folded = _Folding(
                self.values(moments.mean), replace(moments, mean=self.inputs[0], covariance=self.inputs[1])
            )
            value = folded.value(self.node)
            bias = value.weight.new_zeros(value.out_channels) if value.bias is None else value.bias
            self.outputs = (value.weight.view(moments.mean.shape[0], -1, moments.mean.shape[1]), bias)
        folded.remember()
        return self.outputs[0].detach(), self.outputs[1].detach()

    def backward(self, moments: Moments, saved: Sequence[Tensor], dweight: Tensor, dbias: Tensor) -> Pull:
        """Gradients of moments and parameters."""
        wanted = [p for p in self.parameters if p.requires_grad]
        outputs = [(y, dy) for y, dy in zip(self.outputs, (dweight, dbias), strict=True) if y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in outputs],
            [*self.inputs, *wanted],
            [dy for _, dy in outputs],
            retain_graph=True,
            materialize_grads=True,
        )
        by_parameter = {id(p): g for p, g in zip(wanted, found[2:], strict=True)}
        self.gradients = [by_parameter.get(id(p)) for p in self.parameters]
        dmean, spread = found[:2]
        return Pull(dmean, (spread + spread.transpose(-1, -2)) / moments.count)


class _Folding:
    """The fold of a tree in training mode: norms take mean and variance from the moments of what is in front."""

    def __init__(self, values: Mapping[Leaf, AffineConv], moments: Moments) -> None:
        self.values, self.moments = values, moments
        self.seen: list[tuple[nn.BatchNorm2d, Tensor, Tensor]] = []

    def value(self, node: Node) -> AffineConv:
        """The tree as one map of the vector."""
        if isinstance(node, Leaf):
            return self.values[node]
        if isinstance(node, Total):
            return add(*map(self.value, node.parts))
        value = self.value(node.first)
        for link in node.links:
            value = compose(value, self._link(link, value))
        return value

    def _link(self, link: nn.Module, value: AffineConv) -> AffineConv:
        if is_batch_norm(link):
            assert isinstance(link, nn.BatchNorm2d | nn.SyncBatchNorm)
            mean, variance = self._statistics(value)
            self.seen.append((link, mean.detach(), variance.detach()))  # pyright: ignore[reportArgumentType]
            return normalisation(link, mean, variance)
        folded = fold.constant(link, value.out_channels)
        assert isinstance(folded, AffineConv)
        return folded.to(value.weight.device, value.weight.dtype)

    def _statistics(self, value: AffineConv) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``w u + c``: ``w mu + c`` and ``w R w^T``."""
        groups = self.moments.mean.shape[0]
        rows = value.weight.view(groups, -1, self.moments.mean.shape[1])
        mean = (rows @ self.moments.mean.unsqueeze(-1)).flatten()
        variance = ((rows @ self.moments.covariance) * rows).sum(-1).flatten()
        return mean if value.bias is None else mean + value.bias, variance.clamp_min(0)

    def remember(self) -> None:
        """Move the running statistics of the norms that were met."""
        norms, means, variances = zip(*self.seen, strict=True)
        remember(norms, means, variances, self.moments.count)
