"""How a block can run merged: plans made once for its branches, each of which runs many forward passes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from repblocks.blocks.copying import copied, in_float64
from repblocks.blocks.layers import AlignedConv2d
from repblocks.blocks.merged import cost, reading
from repblocks.blocks.merged.depthwise import Depthwise
from repblocks.blocks.merged.flat_rows import FlatRows, Rows
from repblocks.blocks.merged.flat_scales import FlatScales, NormedScales, Scales
from repblocks.blocks.merged.nested import Nested
from repblocks.blocks.merged.outputs import OutputsCall, OwnConv, run_outputs
from repblocks.blocks.merged.patches import Patches, PatchesCall, Pointwise, Unfolded, run_patches
from repblocks.blocks.merged.programs import Program
from repblocks.blocks.merged.reading import Leaf, Node
from repblocks.blocks.merged.statistics import group_of
from repblocks.errors import FoldError
from repblocks.fusion import AffineConv, compose, fold
from repblocks.fusion.alignment import Window
from repblocks.fusion.faithful import is_faithful
from repblocks.fusion.geometry import Pair


class Unmergeable(Exception):
    """Why a plan does not suit the branches of a block; never leaves this package."""


class Plan(ABC):
    """A way to run branches in training mode: ``plan.run(x) == branches(x)``, gradients and running statistics too."""

    @abstractmethod
    def run(self, x: Tensor) -> Tensor:
        """One forward pass."""


class MergedPlan(Plan):
    """Abstract: one that competes with the separate branches."""

    @abstractmethod
    def cost(self, x: Tensor) -> float:
        """Estimated nanoseconds of a forward and backward pass over inputs like x; only their order matters."""


class FoldedPlan(Plan):
    """Branches without batch statistics: folded in every forward pass, differentiably, into one convolution.

    Raises:
        Unmergeable: They do not fold as they are.
    """

    def __init__(self, branches: nn.Module, in_channels: int) -> None:
        self.branches, self.in_channels = branches, in_channels
        if not list(branches.parameters()):
            raise Unmergeable("there is nothing to train")
        numbered(Leaf(branches), in_channels)

    def run(self, x: Tensor) -> Tensor:
        """One convolution."""
        return fold(self.branches, self.in_channels)(x)


class PatchesPlan(MergedPlan):
    """Norms from the moments of the input's patches; one convolution runs.

    Raises:
        Unmergeable: A branch is not linear in the patches, or they are not padded by zeros.
    """

    def __init__(self, node: Node, in_channels: int, x: Tensor) -> None:
        _require_norms(node)
        self.node, self.group = node, _only_group(node)
        found = dict.fromkeys(reading.leaves(node))
        self.values = {leaf: numbered(leaf, in_channels) for leaf in found}
        self.window = Window.over("merge", list(self.values.values()))
        if self.window.padding_mode != "zeros":
            raise Unmergeable(f"{self.window.padding_mode} padding is none of a patch of zeros")
        self.geometry = self._geometry()
        self.patches = self._patches(x)
        self.rows = self._flat_rows()

    def _geometry(self) -> AffineConv:
        """The merged convolution, without numbers."""
        first, *_ = values = list(self.values.values())
        groups = math.gcd(*(value.groups for value in values))
        shape = (first.out_channels, first.in_channels // groups, *self.window.kernel_size)
        return self.window.conv(torch.empty(shape, device="meta"), None, groups)

    def _patches(self, x: Tensor) -> Patches:
        geometry = self.geometry
        if math.prod(geometry.kernel_size) == 1 and geometry.groups == 1 and not geometry.pads:
            return Pointwise(geometry)
        return Depthwise(geometry) if Depthwise.fits(geometry, x.shape[2:]) else Unfolded(geometry)

    def _flat_rows(self) -> Rows | None:
        """Flat branches of convolutions and identities, None where the program has to be folded."""
        terms = reading.flat_terms(self.node)
        if terms is None:
            return None
        convs = [(reading.plain_conv(leaf), norm, leaf) for leaf, norm in terms if leaf.module is not None]
        if any(conv is None for conv, _, _ in convs) or not convs:
            return None
        norms = [norm for leaf, norm in terms if leaf.module is None]
        kernels = [self._aligned(self.values[leaf]).weight for _, _, leaf in convs]
        return Rows(
            convs=tuple(conv for conv, _, _ in convs if conv is not None),
            conv_norms=tuple(norm for _, norm, _ in convs),
            identity_norms=tuple(norms),
            shape=self.shape,
            places=tuple(map(_places, kernels)),
            **self._identity_entries(present=bool(norms)),
        )

    def _identity_entries(self, *, present: bool) -> dict[str, Tensor]:
        """Where an identity of the input lies in the merged weight, its mean and its curvature."""
        if not present:
            return dict.fromkeys(("diagonal", "columns", "squares"), torch.empty(0, dtype=torch.long))
        _, out, taps = self.shape
        diagonal = self._aligned(self.values[Leaf(None)]).weight.flatten().nonzero().flatten()
        columns = torch.arange(len(diagonal)) // out * taps + diagonal % taps
        return {"diagonal": diagonal, "columns": columns, "squares": columns * taps + columns % taps}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the merged weight: groups, channels that each writes, P."""
        groups = self.geometry.groups
        return groups, self.geometry.out_channels // groups, self.geometry.weight[0].numel()

    def _aligned(self, value: AffineConv) -> AffineConv:
        """A value over the patches, without spatial dims."""
        kernel = self.window.kernel([value.promote(2)], self.geometry.groups)
        return AffineConv(weight=kernel.flatten(1), bias=value.bias, groups=self.geometry.groups)

    def _leaf_values(self, like: Tensor) -> Mapping[Leaf, AffineConv]:
        return {leaf: self._aligned(live(leaf, self.geometry.in_channels, like)) for leaf in self.values}

    def cost(self, x: Tensor) -> float:
        """The convolution, the moments both ways, and the arithmetic of the rows."""
        rows = len(self.values) if self.rows is None else len(self.rows.convs)
        return self.patches.cost(x) + cost.program_cost(self.geometry, rows, nested=self.rows is None)

    def run(self, x: Tensor) -> Tensor:
        """One merged convolution."""
        program, parameters = self._program(x.device)
        return run_patches(PatchesCall(program, self.patches, self.group), x, parameters)

    def _program(self, device: torch.device) -> tuple[Program, Sequence[Tensor | None]]:
        if self.rows is None:
            parameters = reading.parameters(self.node, only=list(self.values))
            return Nested(self.node, self._leaf_values, parameters), parameters
        if self.rows.diagonal.device != device:
            self.rows = self.rows.to(device)
        return FlatRows(self.rows), self.rows.parameters


class OutputsPlan(MergedPlan):
    """Branches convolve one by one; their norms and sums become one combination of what they give.

    Convolutions of few MACs are run again in the backward pass instead of being kept.

    Raises:
        Unmergeable: The norms share statistics with different processes.
    """

    def __init__(self, node: Node, in_channels: int) -> None:
        _require_norms(node)
        self.node, self.group = node, _only_group(node)
        found = list(dict.fromkeys(reading.leaves(node)))
        steps = {leaf: _sampling(leaf, in_channels) for leaf in found}
        self.diagonal = [leaf for leaf, step in steps.items() if step is not None]
        self.sampling = next((step for step in steps.values() if step is not None), None)
        convolving = [leaf for leaf in found if leaf not in self.diagonal]
        sizes = {leaf: sum(p.numel() for p in leaf.module.parameters()) for leaf in convolving if leaf.module}
        total = sum(sizes.values())
        self.recomputed = [leaf for leaf, size in sizes.items() if _is_own(leaf) and _is_cheap(leaf, size, total)]
        self.convolved = [leaf for leaf in sizes if leaf in self.recomputed or (_is_own(leaf) and _is_depthwise(leaf))]
        self.kept = [leaf for leaf in convolving if leaf not in self.convolved]
        self.index = {leaf: k for k, leaf in enumerate([*self.kept, *self.convolved])}
        self.index |= dict.fromkeys(self.diagonal, len(self.index))
        self.in_channels, self.count = in_channels, max(self.index.values()) + 1
        self.scales = self._flat_scales()

    def _flat_scales(self) -> Scales | None:
        """A sum of norms, or a norm of a sum, None where the program has to be folded."""
        terms, outer = reading.flat_terms(self.node), None
        if terms is None:
            terms, outer = reading.normed_terms(self.node)
        factors = [reading.plain_conv(leaf) if leaf in self.diagonal else None for leaf, _ in terms]
        scaling = [leaf.module is not None and leaf in self.diagonal for leaf, _ in terms]
        unknown = any(scales and conv is None for scales, conv in zip(scaling, factors, strict=True))
        behind = outer is not None and any(
            conv is not None and norm is not None for conv, (_, norm) in zip(factors, terms, strict=True)
        )
        if not terms or unknown or behind:
            return None
        return Scales(
            norms=tuple(norm for _, norm in terms),
            reads=tuple(self.index[leaf] for leaf, _ in terms),
            factors=tuple(factors),
            outputs=self.count,
            outer=outer,
        )

    def cost(self, x: Tensor) -> float:
        """The convolutions, a few passes over each output, the small arithmetic."""
        modules = [leaf.module for leaf in [*self.kept, *self.convolved] if leaf.module is not None]
        again = [leaf.module for leaf in self.recomputed if leaf.module is not None]
        return cost.outputs_cost(modules, again, self.count, x, nested=self.scales is None)

    def run(self, x: Tensor) -> Tensor:
        """Convolve, then combine."""
        kept = [leaf.module(x) for leaf in self.kept if leaf.module is not None]
        found = [(leaf, reading.plain_conv(leaf)) for leaf in self.convolved]
        convs = [OwnConv(conv, keeps=leaf not in self.recomputed) for leaf, conv in found if conv is not None]
        program, parameters = self._program()
        call = OutputsCall(
            program,
            convs,
            sampling=self.sampling,
            crosses=self.scales is None or self.scales.outer is not None,
            group=self.group,
        )
        return run_outputs(call, x, kept, parameters)

    def _program(self) -> tuple[Program, Sequence[Tensor | None]]:
        if self.scales is not None:
            program = FlatScales(self.scales) if self.scales.outer is None else NormedScales(self.scales)
            return program, self.scales.parameters
        parameters = reading.parameters(self.node, only=self.diagonal)
        return Nested(self.node, self._leaf_values, parameters), parameters

    def _leaf_values(self, like: Tensor) -> Mapping[Leaf, AffineConv]:
        return {leaf: self._leaf_value(leaf, like) for leaf in self.index}

    def _leaf_value(self, leaf: Leaf, like: Tensor) -> AffineConv:
        """One of the outputs, or a diagonal map of the last, which is the input."""
        channels = len(like)
        one = torch.zeros(channels, self.count, dtype=like.dtype, device=like.device)
        one[:, self.index[leaf]] = 1
        value = AffineConv(weight=one, groups=channels)
        if leaf not in self.diagonal:
            return value
        scale = live(leaf, self.in_channels, like)
        return compose(value, AffineConv(weight=scale.weight.flatten(1), bias=scale.bias, groups=channels))


def live(leaf: Leaf, in_channels: int, like: Tensor) -> AffineConv:
    """The value of a leaf that refers to its parameters, in the dtype of the moments."""
    value = fold.constant(leaf.module or nn.Identity(), in_channels)
    return value.to(like.device, like.dtype)  # pyright: ignore[reportReturnType]  # nothing transposed comes this far


def numbered(leaf: Leaf, in_channels: int) -> AffineConv:
    """The value of a leaf on the CPU in float64; a plain convolution's entries are numbered from 1.

    Raises:
        Unmergeable: It is not linear, or does not fold.
    """
    if leaf.follows_batch:
        raise Unmergeable(f"{type(leaf.module).__name__} has norms inside that are not understood")
    module = copied(leaf.module or nn.Identity(), in_float64)
    if isinstance(module, nn.Conv2d) and reading.plain_conv(leaf) is not None:
        module.weight = nn.Parameter(torch.arange(1.0, module.weight.numel() + 1).double().view(module.weight.shape))
    try:
        return fold.constant(module, in_channels).promote(2)  # pyright: ignore
    except FoldError as error:
        raise Unmergeable(str(error)) from error


def _places(kernel: Tensor) -> Tensor | None:
    """For each entry of a numbered kernel, where it lies in the merged one; None if in order."""
    numbers = kernel.flatten()
    places = numbers.argsort()[int((numbers == 0).sum()) :]
    return None if torch.equal(places, torch.arange(len(numbers))) else places


def _sampling(leaf: Leaf, in_channels: int) -> Pair | None:
    """The stride of a leaf that only scales and shifts the pixels that it reads, channel by channel; else None."""
    try:
        value = numbered(leaf, in_channels)
    except Unmergeable:
        return None
    unmoved = math.prod(value.kernel_size) == 1 and not value.pads
    single = value.groups == value.in_channels == value.out_channels
    return (value.stride[0], value.stride[1]) if unmoved and single else None


def _is_cheap(leaf: Leaf, size: int, total: int) -> bool:
    """Whether to run a convolution again: a small part of the block, or one of several depthwise ones."""
    return 8 * size <= total or (_is_depthwise(leaf) and 2 * size <= total)


def _is_depthwise(leaf: Leaf) -> bool:
    conv = reading.plain_conv(leaf)
    return conv is not None and conv.groups == conv.in_channels == conv.out_channels


def _is_own(leaf: Leaf) -> bool:
    """Whether a leaf is a convolution that `OwnConv` can run."""
    conv = reading.plain_conv(leaf)
    if conv is None or conv.padding_mode != "zeros" or conv.padding == "same":
        return False
    unmoved = isinstance(conv, AlignedConv2d) and is_faithful(conv, AlignedConv2d) and not any(map(any, conv.window))
    return is_faithful(conv, nn.Conv2d) or (unmoved and conv.kernel_size == (1, 1))


def _require_norms(node: Node) -> None:
    found = list(reading.norms(node))
    if not found:
        raise Unmergeable("no norm of the batch stands behind a sum or chain that is understood")
    if len(set(found)) < len(found):
        raise Unmergeable("one norm stands behind several branches")


def _only_group(node: Node) -> dist.ProcessGroup | None:
    groups = {group_of(norm) for norm in reading.norms(node)}
    if len(groups) > 1:
        raise Unmergeable("norms that share statistics with different processes")
    return groups.pop()
