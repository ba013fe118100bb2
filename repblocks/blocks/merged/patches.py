"""Merged execution over input patches: norms from the patches' moments, one convolution for all branches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from repblocks.blocks.merged import cost
from repblocks.blocks.merged.layout import (
    add_symmetric_,
    convolution_gradients,
    empty_map,
    mirrored,
    parts_of,
    rows_of,
    sampled,
    spread,
)
from repblocks.blocks.merged.precision import convolution_dtype, widened, without_autocast
from repblocks.blocks.merged.programs import Program
from repblocks.blocks.merged.statistics import Moments, require_statistics, synchronised
from repblocks.fusion import AffineConv
from repblocks.fusion.geometry import Pair, flat_padding
from repblocks.fusion.matrix import output_size


class Patches(ABC):
    """How to see, convolve and pull back the patches of one geometry.

    A patch is ``u_t`` of P entries, channels of one group times taps, in the order of ``weight.flatten(1)``.

    Args:
        geometry: The merged convolution, padded by zeros; its numbers are not read.
    """

    def __init__(self, geometry: AffineConv) -> None:
        self.geometry = geometry

    @abstractmethod
    def cost(self, x: Tensor) -> float:
        """Estimated nanoseconds of a forward and backward pass over inputs like x."""

    @abstractmethod
    def moments(self, x: Tensor) -> Moments:
        """Mean ``[groups, P]`` and covariance ``[groups, P, P]`` of the patches."""

    @abstractmethod
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``y_t = weight u_t + bias``, weight ``[groups, O / groups, P]``."""

    @abstractmethod
    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """``sum_t dy_t u_t^T``, ``[groups, O / groups, P]``."""

    @abstractmethod
    def input_gradient(self, x: Tensor, dy: Tensor, weight: Tensor, curvature: Tensor, offset: Tensor) -> Tensor:
        """``dx`` of ``du_t = weight^T dy_t + curvature u_t + offset``, with ``[groups, P, P]`` and ``[groups, P]``."""


class PatchesCall:
    """One forward pass: moments, program, one convolution."""

    def __init__(self, program: Program, patches: Patches, group: Any) -> None:
        self.program, self.patches, self.group = program, patches, group

    def forward(self, x: Tensor, cast: torch.dtype) -> Tensor:
        """The merged convolution of x, in the dtype of the convolution."""
        self.moments = synchronised(self.patches.moments(widened(x)), self.group)
        geometry = self.patches.geometry
        require_statistics(self.moments.count, (len(x), geometry.out_channels, *output_size(geometry, x.shape[2:])))
        weight, bias = self.program.forward(self.moments)
        self.weight = weight
        return self.patches.convolve(x.to(cast), weight.to(cast), bias.to(cast))

    def backward(self, x: Tensor, saved: Sequence[Tensor], dy: Tensor, needs_input: bool) -> list[Tensor | None]:  # noqa: FBT001
        """Gradients of the input and of the program's parameters."""
        dweight = self.patches.weight_gradient(x, dy).to(self.weight.dtype)
        dbias = dy.to(self.weight.dtype).sum((0, 2, 3))
        pull = self.program.backward(self.moments, saved, dweight, dbias)
        if not needs_input and self.group is None:
            return [None, *self.program.gradients]
        curvature, dmean = self.moments.summed(pull.curvature), self.moments.summed(pull.dmean)
        offset = dmean / self.moments.count - (curvature @ self.moments.mean.unsqueeze(-1)).squeeze(-1)
        dx = self.patches.input_gradient(x, dy, self.weight, curvature, offset) if needs_input else None
        return [dx, *self.program.gradients]


class _Patches(torch.autograd.Function):
    """`PatchesCall` for autograd."""

    @staticmethod
    def forward(ctx: Any, call: PatchesCall, x: Tensor, *_: Tensor) -> Tensor:
        """See `PatchesCall.forward`."""
        cast = convolution_dtype(x)
        with without_autocast(x):
            y = call.forward(x, cast)
        ctx.call = call
        ctx.save_for_backward(x.to(cast), *call.program.saved)
        call.program.saved = ()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `PatchesCall.backward`."""
        x, *saved = ctx.saved_tensors
        with without_autocast(x):
            return None, *ctx.call.backward(x, saved, dy, ctx.needs_input_grad[1])


def run_patches(call: PatchesCall, x: Tensor, parameters: Sequence[Tensor | None]) -> Tensor:
    """Run a call; ``parameters`` are the program's."""
    return _Patches.apply(call, x, *parameters)  # pyright: ignore


def centred_moments(vectors: Tensor) -> Moments:
    """Of vectors ``[groups, M, P]``, centred before they are multiplied, so that a large mean costs no digits."""
    mean = vectors.mean(1)
    centred = vectors - mean.unsqueeze(1)
    count = vectors.shape[1]
    return Moments(mean, centred.transpose(1, 2) @ centred / count, count)


class Pointwise(Patches):
    """1x1 kernels, strided or not: a patch is a pixel, and everything is a product of matrices."""

    def cost(self, x: Tensor) -> float:
        """Products of matrices."""
        return cost.pointwise_cost(self.geometry, x)

    def moments(self, x: Tensor) -> Moments:
        """The Gram matrix of the pixels that are read, a few images at a time."""
        read = self._read(x)
        rows = rows_of(read)
        mean, total = rows.mean(0), rows.new_zeros(rows.shape[1], rows.shape[1])
        for part in parts_of(read, read):
            centred = rows_of(read[part]) - mean
            add_symmetric_(total, centred, centred)
        return Moments(mean.unsqueeze(0), mirrored(total).unsqueeze(0) / len(rows), len(rows))

    def _read(self, x: Tensor) -> Tensor:
        return sampled(x, self.geometry.stride)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``x weight^T + bias``."""
        read = self._read(x)
        y = empty_map(read, len(bias))
        torch.addmm(bias, rows_of(read), weight[0].t(), out=rows_of(y))
        return y

    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """``dy^T x``."""
        return (rows_of(dy).t() @ rows_of(self._read(x))).unsqueeze(0)

    def input_gradient(self, x: Tensor, dy: Tensor, weight: Tensor, curvature: Tensor, offset: Tensor) -> Tensor:
        """``dy weight + x curvature + offset`` at the pixels that were read, zeros between."""
        read, constant = self._read(x), offset[0].to(dy.dtype)
        kernel, bend = weight[0].to(dy.dtype), curvature[0].to(dy.dtype)
        gradient = empty_map(read, x.shape[1])
        for part in parts_of(read, dy):
            rows = rows_of(gradient[part])
            torch.addmm(constant, rows_of(dy[part]), kernel, out=rows)
            rows.addmm_(rows_of(read[part]), bend)
        return spread(gradient, self.geometry.stride, x)


class Unfolded(Patches):
    """Any geometry: the patches are laid out in memory, P times the input. For few channels, and as the plain twin."""

    def cost(self, x: Tensor) -> float:
        """Mostly memory."""
        return cost.unfolded_cost(self.geometry, x)

    def moments(self, x: Tensor) -> Moments:
        """The Gram matrices of the patches."""
        return centred_moments(self._unfolded(x))

    def _unfolded(self, x: Tensor) -> Tensor:
        """``[groups, M, P]``."""
        slices = self._slices(F.pad(x, flat_padding(self.geometry.padding)), output_size(self.geometry, x.shape[2:]))
        taps = torch.stack(slices, -1)
        patches = taps.permute(0, 2, 3, 1, 4).reshape(-1, self.geometry.groups, self.geometry.weight[0].numel())
        return patches.transpose(0, 1)

    def _slices(self, padded: Tensor, size: Sequence[int]) -> list[Tensor]:
        """For each tap, the view of the padded map that it reads."""
        (down, right), (rows, columns) = self.geometry.stride, self.geometry.dilation
        return [
            padded[:, :, i * rows :: down, j * columns :: right][:, :, : size[0], : size[1]]
            for i in range(self.geometry.kernel_size[0])
            for j in range(self.geometry.kernel_size[1])
        ]

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """One convolution."""
        return convolved(self.geometry, x, weight, bias)

    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """The convolution's own."""
        shape = (self.geometry.groups, -1, self.geometry.weight[0].numel())
        return convolution_backward(self.geometry, x, dy, None).reshape(shape)

    def input_gradient(self, x: Tensor, dy: Tensor, weight: Tensor, curvature: Tensor, offset: Tensor) -> Tensor:
        """The patches' gradients, added up where patches overlap."""
        groups = len(weight)
        wide = dy.dtype if dy.dtype == weight.dtype else weight.dtype
        cotangent = rows_of(dy).to(wide).view(-1, groups, weight.shape[1]).transpose(0, 1)
        du = cotangent @ weight + self._unfolded(x.to(wide)) @ curvature + offset.unsqueeze(1)
        padded = F.pad(torch.zeros_like(x, dtype=wide), flat_padding(self.geometry.padding))
        size = output_size(self.geometry, x.shape[2:])
        slices = self._slices(padded, size)
        by_tap = du.transpose(0, 1).reshape(x.shape[0], *size, x.shape[1], len(slices))
        for i, view in enumerate(slices):
            view.add_(by_tap[..., i].permute(0, 3, 1, 2))
        (top, _), (left, _) = self.geometry.padding
        return padded[:, :, top : top + x.shape[2], left : left + x.shape[3]].to(x.dtype)


def padded_evenly(geometry: AffineConv, x: Tensor) -> tuple[Tensor, Pair]:
    """The input and the padding that is left to the convolution, which knows the same on both sides only."""
    (top, bottom), (left, right) = geometry.padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, flat_padding(geometry.padding)), (0, 0)


def convolved(geometry: AffineConv, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution of a geometry."""
    x, padding = padded_evenly(geometry, x)
    kernel = weight.reshape(geometry.weight.shape)
    return F.conv2d(x, kernel, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def convolution_backward(geometry: AffineConv, x: Tensor, dy: Tensor, weight: Tensor | None) -> Tensor:
    """Gradient of the evenly padded input, where a weight is given, or that of the weight, where none is."""
    padded, padding = padded_evenly(geometry, x)
    kernel = padded.new_empty(geometry.weight.shape) if weight is None else weight.reshape(geometry.weight.shape)
    sizes = (geometry.stride, padding, geometry.dilation, geometry.groups)
    wanted = (weight is not None, weight is None, False)
    gradients = convolution_gradients(dy, padded, kernel.to(dy.dtype), *sizes, wanted)
    return gradients[1 if weight is None else 0]
