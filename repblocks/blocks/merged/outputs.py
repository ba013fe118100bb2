"""Merged execution over explicit outputs: branches convolve, their norms become one affine combination."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from repblocks.blocks.merged.layout import added, convolution_gradients, in_parts, parts_of, put, sampled, spread
from repblocks.blocks.merged.precision import convolution_dtype, widened, without_autocast
from repblocks.blocks.merged.programs import Program, Pull
from repblocks.blocks.merged.statistics import Moments, require_statistics, synchronised
from repblocks.fusion.geometry import Pair


class OwnConv:
    """A convolution of the input that a call runs itself, a few images at a time where it is depthwise.

    Args:
        conv: Padded by zeros, the same on both sides; or pointwise, of any stride.
        keeps: Whether its output is kept for the backward pass, instead of being calculated again.
    """

    def __init__(self, conv: nn.Conv2d, *, keeps: bool) -> None:
        self.keeps, self.depthwise = keeps, conv.groups == conv.in_channels
        self.parameters = [conv.weight] if conv.bias is None else [conv.weight, conv.bias]
        pointwise = conv.kernel_size == (1, 1)
        self.sampling: Pair = (conv.stride[0], conv.stride[1]) if pointwise else (1, 1)
        padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
        self.geometry = ((1, 1) if pointwise else conv.stride, padding, conv.dilation)
        self.groups = conv.groups

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The convolution, in the dtype of x."""
        weight, *bias = (p.to(x.dtype) for p in parameters)
        stride, padding, dilation = self.geometry
        read = sampled(x, self.sampling)
        return F.conv2d(read, weight, bias[0] if bias else None, stride, padding, dilation, self.groups)

    def backward(
        self, x: Tensor, parameters: Sequence[Tensor], dy: Tensor, *, needs_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of the input and of the parameters."""
        weight, bias = parameters[0].to(x.dtype), len(parameters) > 1
        read = sampled(x, self.sampling)
        wanted = (needs_input, True, bias)
        dx, *own = convolution_gradients(dy, read, weight, *self.geometry, self.groups, wanted)
        dx = spread(dx, self.sampling, x) if needs_input else None
        return dx, [g.to(p.dtype) for g, p in zip(own, parameters, strict=False)]


class OutputsCall:
    """One forward pass: ``y = sum_k weight_k f_k + bias`` with the f_k given, convolved here, or the input itself.

    Args:
        program: Makes weight and bias from the moments of the outputs.
        convs: Convolutions of the input that write some of the outputs.
        sampling: Steps at which the input's pixels are one of the outputs, the last; None if they are none.
        crosses: Whether the program needs covariances between outputs.
        group: Of processes that share statistics.
    """

    def __init__(
        self,
        program: Program,
        convs: Sequence[OwnConv],
        *,
        sampling: Pair | None,
        crosses: bool,
        group: Any,
    ) -> None:
        self.program, self.convs = program, convs
        self.sampling, self.crosses, self.group = sampling, crosses, group

    @property
    def needs_input(self) -> bool:
        """Whether the backward pass reads the input."""
        return self.sampling is not None or bool(self.convs)

    def outputs(
        self, x: Tensor, given: Sequence[Tensor], own: Sequence[Tensor], made: Mapping[int, Tensor]
    ) -> list[Tensor]:
        """Every f_k: the given ones, those convolved here unless they are made already, the input."""
        found = {**made, **self._convolved(x, self._split(own), [i for i in range(len(self.convs)) if i not in made])}
        pixels = [] if self.sampling is None else [_pixels(x, self.sampling)]
        return [*given, *(found[i] for i in range(len(self.convs))), *pixels]

    def _convolved(self, x: Tensor, own: Sequence[Sequence[Tensor]], missing: Sequence[int]) -> dict[int, Tensor]:
        """What some of the convolutions write."""

        def convolve(images: Tensor) -> list[Tensor]:
            return [self.convs[i].forward(images, own[i]) for i in missing]

        if not missing:
            return {}
        together = all(self.convs[i].depthwise for i in missing)
        outputs = in_parts(convolve, x.to(self.cast)) if together else convolve(x.to(self.cast))
        return dict(zip(missing, outputs, strict=True))

    def _split(self, own: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The convolutions' parameters, one after the other, as those of each."""
        tensors = iter(own)
        return [[next(tensors) for _ in conv.parameters] for conv in self.convs]

    def forward(self, x: Tensor, kept: Sequence[Tensor], own: Sequence[Tensor], cast: torch.dtype) -> Tensor:
        """The combination of all outputs."""
        self.cast = cast
        outputs = self.outputs(x, kept, own, {})
        first = outputs[0]
        self.moments = synchronised(moments_of(outputs, crosses=self.crosses), self.group)
        require_statistics(self.moments.count, first.shape)
        self.weight, bias = self.program.forward(self.moments)
        self.made = {i: outputs[len(kept) + i] for i, conv in enumerate(self.convs) if conv.keeps}
        return _combined(outputs, self.weight, bias)

    def backward(
        self,
        x: Tensor,
        kept: Sequence[Tensor],
        own: Sequence[Tensor],
        made: Mapping[int, Tensor],
        saved: Sequence[Tensor],
        dy: Tensor,
        *,
        wants_input: bool,
    ) -> list[Tensor | None]:
        """Gradients of the input, the kept outputs, the own convolutions' parameters and the program's."""
        outputs = self.outputs(x, kept, own, made)
        dweight, dbias = _products(dy, outputs)
        pull = self.program.backward(self.moments, saved, dweight, dbias)
        pull = Pull(self.moments.summed(pull.dmean), self.moments.summed(pull.curvature))
        back, dx = _Backward(self, pull, kept), None
        for part in parts_of(outputs[0], x):
            images = back.run(x[part], [f[part] for f in outputs], self._split(own), dy[part], part, wants_input)
            if wants_input and images is not None:
                dx = put(dx, part, images, len(x))
        return [dx, *back.of_kept, *back.of_own, *self.program.gradients]

    def pulled(self, k: int, outputs: Sequence[Tensor], dy: Tensor, pull: Pull) -> Tensor:
        """``df_k = weight_k dy + sum_l curvature_kl (f_l - mean_l) + dmean_k / M``."""
        curvature, mean, count = pull.curvature[:, k], self.moments.mean, self.moments.count
        if self.crosses:
            bends = dict(enumerate(curvature.unbind(1)))
            offset = pull.dmean[:, k] / count - (curvature * mean).sum(1)
        else:
            bends = {k: curvature}
            offset = pull.dmean[:, k] / count - curvature * mean[:, k]
        gradient = torch.addcmul(_channels(offset), dy, _channels(self.weight[:, 0, k]))
        for i, bend in bends.items():
            gradient.addcmul_(outputs[i], _channels(bend))
        return gradient.to(outputs[k].dtype)


class _Backward:
    """The part of a backward pass that goes through the batch a few images at a time, while they are in the cache."""

    def __init__(self, call: OutputsCall, pull: Pull, kept: Sequence[Tensor]) -> None:
        self.call, self.pull, self.kept = call, pull, kept
        self.of_kept: list[Tensor | None] = [None] * len(kept)
        self.of_own: list[Tensor] = []

    def run(
        self,
        x: Tensor,
        outputs: Sequence[Tensor],
        own: Sequence[Sequence[Tensor]],
        dy: Tensor,
        part: slice,
        wants_input: bool,  # noqa: FBT001
    ) -> Tensor | None:
        """The input's gradient for some images; gradients of parameters add up, of kept outputs are filled in."""
        call, first = self.call, len(self.kept)
        for k, whole in enumerate(self.of_kept):
            self.of_kept[k] = put(whole, part, call.pulled(k, outputs, dy, self.pull), len(self.kept[k]))
        dx = None
        if call.sampling is not None:
            dx = spread(call.pulled(len(outputs) - 1, outputs, dy, self.pull), call.sampling, x)
        gradients: list[Tensor] = []
        for k, conv in enumerate(call.convs):
            pulled = call.pulled(first + k, outputs, dy, self.pull)
            more, more_own = conv.backward(x.to(call.cast), own[k], pulled, needs_input=wants_input)
            gradients += more_own
            dx = more if dx is None else dx if more is None else dx.add_(more)
        self.of_own = [a + b for a, b in zip(self.of_own, gradients, strict=True)] if self.of_own else gradients
        return dx


class _Outputs(torch.autograd.Function):
    """`OutputsCall` for autograd: the input, the kept outputs, own convolutions' parameters, the program's."""

    @staticmethod
    def forward(ctx: Any, call: OutputsCall, x: Tensor, kept: int, own: int, *tensors: Tensor) -> Tensor:
        """See `OutputsCall.forward`."""
        needed = tensors[: kept + own]
        cast = convolution_dtype(x)
        with without_autocast(x):
            y = call.forward(x, needed[:kept], needed[kept:], cast)
        ctx.call, ctx.kept, ctx.read = call, kept, kept + own
        ctx.made = tuple(call.made)
        read = x if call.needs_input else x.new_empty(0)
        ctx.save_for_backward(read, *needed, *call.made.values(), *call.program.saved)
        call.made, call.program.saved = {}, ()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `OutputsCall.backward`."""
        x, *tensors = ctx.saved_tensors
        call, kept, read = ctx.call, ctx.kept, ctx.read
        wants_input = ctx.needs_input_grad[1]
        with without_autocast(x):
            made = dict(zip(ctx.made, tensors[read:], strict=False))
            needed = tensors[:kept], tensors[kept:read], made, tensors[read + len(made) :]
            dx, *others = call.backward(x, *needed, dy, wants_input=wants_input)
        return None, dx, None, None, *others


def run_outputs(call: OutputsCall, x: Tensor, kept: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> Tensor:
    """Run a call; ``parameters`` are the program's."""
    own = [p for conv in call.convs for p in conv.parameters]
    return _Outputs.apply(call, x, len(kept), len(own), *kept, *own, *parameters)  # pyright: ignore


def moments_of(outputs: Sequence[Tensor], *, crosses: bool) -> Moments:
    """Mean and variance per channel over all positions, ``[C, K]``; or covariances of the outputs, ``[C, K, K]``."""
    pairs = [torch.batch_norm_update_stats(widened(f), None, None, 0.0) for f in outputs]
    mean, variance = (torch.stack(parts, -1) for parts in zip(*pairs, strict=True))
    count = outputs[0].numel() // outputs[0].shape[1]
    if not crosses:
        return Moments(mean, variance, count)
    covariance = torch.diag_embed(variance)
    centred = [widened(f) - _channels(mean[:, k]) for k, f in enumerate(outputs)]
    for k, i in combinations(range(len(outputs)), 2):
        covariance[:, k, i] = covariance[:, i, k] = _dot(centred[k], centred[i]) / count
    return Moments(mean, covariance, count)


def _combined(outputs: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """``sum_k weight_k f_k + bias``, weight ``[C, 1, K]``, in the dtype of the outputs."""
    factors = [_channels(factor) for factor in weight.squeeze(1).unbind(1)]
    first, total = outputs[0], None
    for part in parts_of(*outputs):
        some = torch.addcmul(_channels(bias), first[part], factors[0])
        for f, factor in zip(outputs[1:], factors[1:], strict=True):
            some.addcmul_(f[part], factor)
        total = put(total, part, some.to(first.dtype), len(first))
    assert total is not None
    return total


def _products(dy: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``sum dy f_k`` as ``[C, 1, K]``, and ``sum dy``."""
    some = [(widened(dy[part]), [f[part] for f in outputs]) for part in parts_of(*outputs)]
    products = [torch.stack([_dot(gradient, f) for f in read], -1) for gradient, read in some]
    total = [gradient.sum((0, 2, 3)) for gradient, _ in some]
    return added(products).unsqueeze(1), added(total)


def _pixels(x: Tensor, sampling: Pair) -> Tensor:
    """The pixels that a pointwise convolution of this stride reads, side by side in memory."""
    return x if sampling == (1, 1) else sampled(x, sampling).contiguous(memory_format=torch.channels_last)


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (widened(a) * b).sum((0, 2, 3))
