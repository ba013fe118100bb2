"""The value of the algebra: one affine convolution, frozen."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from repblocks.errors import FoldError
from repblocks.fusion.faithful import is_faithful
from repblocks.fusion.geometry import Pair, flat_padding, insert_zeros, reach, surround

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES: tuple[PaddingMode, ...] = ("zeros", "reflect", "replicate", "circular")
ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d
Module = TypeVar("Module", bound=nn.Module)
CONV_CLASSES: dict[int, type[ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True, repr=False)
class AffineConv:
    """A linear piece of a convolutional network: ``conv(x) == convolution(pad(x), weight) + bias``.

    The value is immutable, keeps its dtype and device, is a pytree, and is differentiable: gradients flow to
    whatever tensors it was made from.

    Args:
        weight: ``[out_channels, in_channels / groups, *kernel_size]`` with 0 to 3 spatial dims. Without spatial
            dims it is a linear map over the channels, and takes the rank of whatever it meets.
        bias: ``[out_channels]``, or None: structurally absent, never a test for zeros.
        stride: Per spatial dim; ``()`` means 1.
        padding: ``(before, after)`` per spatial dim; ``()`` means none.
        dilation: Per spatial dim; ``()`` means 1.
        groups: Divides both channel counts.
        padding_mode: As in ``nn.Conv2d``; without meaning where nothing is padded.

    Raises:
        FoldError: Shapes, dtypes and geometry do not fit each other.

    Source: Ding et al. 2021, "RepVGG", https://arxiv.org/abs/2101.03697, section 3.3.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[Pair, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: PaddingMode = "zeros"

    def __post_init__(self) -> None:
        rank = self.weight.ndim - 2
        for name, default in (("stride", 1), ("padding", (0, 0)), ("dilation", 1)):
            given = getattr(self, name)
            if not isinstance(given, tuple) or (name == "padding" and not all(isinstance(p, tuple) for p in given)):
                raise FoldError(
                    f"got {name}={given!r}; needed a tuple with one entry per spatial dim, {default!r} or other"
                )
            object.__setattr__(self, name, given or (default,) * rank)
        self._validate(rank)

    def _validate(self, rank: int) -> None:
        if not 0 <= rank <= 3 or 0 in self.weight.shape:
            raise FoldError(f"got a weight of shape {tuple(self.weight.shape)}; needed [O, I / groups, *kernel_size]")
        if self.groups < 1 or self.out_channels % self.groups:
            raise FoldError(f"groups={self.groups} must be positive and divide the {self.out_channels} out channels")
        if self.bias is not None and (self.bias.shape != (self.out_channels,) or self.bias.dtype != self.weight.dtype):
            raise FoldError(
                f"got a bias {tuple(self.bias.shape)} of {self.bias.dtype}; "
                f"needed ({self.out_channels},) of the weight's {self.weight.dtype}"
            )
        self._validate_geometry(rank)

    def _validate_geometry(self, rank: int) -> None:
        if any(len(sizes) != rank for sizes in (self.stride, self.padding, self.dilation)):
            raise FoldError(f"stride, padding and dilation of {self!r} must have {rank} entries, one per spatial dim")
        if any(n < 1 for n in (*self.stride, *self.dilation)) or any(p < 0 for pair in self.padding for p in pair):
            raise FoldError(f"{self!r} needs stride and dilation >= 1 and padding >= 0")
        if self.padding_mode not in PADDING_MODES:
            raise FoldError(f"got padding_mode={self.padding_mode!r}; needed one of {', '.join(PADDING_MODES)}")

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the convolution to ``[N, in_channels, *size]``: the reference meaning of the value."""
        if self.rank:
            return self._convolve(x)
        if x.ndim == 2:
            return self.promote(1)._convolve(x.unsqueeze(-1)).squeeze(-1)
        return self.promote(x.ndim - 2)._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.rank - 1]
        if self.padding_mode == "zeros" and all(before == after for before, after in self.padding):
            sides = tuple(before for before, _ in self.padding)
            return convolve(x, self.weight, self.bias, self.stride, sides, self.dilation, self.groups)
        if self.pads:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, flat_padding(self.padding), mode)
        return convolve(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def __repr__(self) -> str:
        kernel = f", kernel_size={self.kernel_size}" if self.rank else ""
        plain = unusual_geometry(self)
        shown = "".join(f", {name}={value}" for name, value in plain.items())
        bias = ", bias" if self.bias is not None else ""
        return f"AffineConv({self.in_channels}->{self.out_channels}{kernel}{shown}{bias})"

    @property
    def rank(self) -> int:
        """Number of spatial dims, 0 to 3."""
        return self.weight.ndim - 2

    @property
    def in_channels(self) -> int:
        """Channels read."""
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Channels written."""
        return self.weight.shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Taps per spatial dim."""
        return tuple(self.weight.shape[2:])

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance from the first tap to the last, per spatial dim."""
        return reach(self.kernel_size, self.dilation)

    @property
    def pads(self) -> bool:
        """Whether any side is padded."""
        return any(map(any, self.padding))

    @property
    def is_pointwise(self) -> bool:
        """Whether it maps every pixel by itself: one tap, stride 1, no padding."""
        return math.prod(self.kernel_size) == math.prod(self.stride) == 1 and not self.pads

    @property
    def is_diagonal(self) -> bool:
        """Whether it only scales and shifts each channel, as BatchNorm does."""
        return self.is_pointwise and self.groups == self.in_channels == self.out_channels

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "AffineConv":
        """The same value on another device or in another dtype."""
        bias = None if self.bias is None else self.bias.to(device=device, dtype=dtype)
        return replace(self, weight=self.weight.to(device=device, dtype=dtype), bias=bias)

    def promote(self, rank: int) -> "AffineConv":
        """A map without spatial dims as the pointwise convolution of ``rank`` spatial dims.

        Raises:
            FoldError: The value has another, non-zero rank.
        """
        if self.rank == rank:
            return self
        if self.rank:
            raise FoldError(f"{self!r} has {self.rank} spatial dims; needed {rank}, or a map without spatial dims")
        return AffineConv(
            weight=self.weight.reshape(*self.weight.shape, *(1,) * rank), bias=self.bias, groups=self.groups
        )

    def flatten(self) -> "AffineConv":
        """A pointwise convolution as a map without spatial dims: the inverse of `promote`.

        Raises:
            FoldError: The kernel has more than one tap, or the convolution strides or pads.
        """
        if not self.is_pointwise:
            raise FoldError(f"{self!r} reads neighbours or changes the grid; only a pointwise convolution is linear")
        return AffineConv(weight=self.weight.flatten(1), bias=self.bias, groups=self.groups)

    @classmethod
    def from_module(cls, module: ConvNd) -> Self:
        """The value of a convolution module: ``AffineConv.from_module(m)(x) == m(x)``.

        Live parameters are referenced, not copied, so gradients reach them.

        Raises:
            FoldError: It is a subclass with a forward of its own, or carries forward hooks.
        """
        if not any(is_faithful(module, conv) for conv in CONV_CLASSES.values() if isinstance(module, conv)):
            raise FoldError(
                f"{type(module).__name__} is hooked, or does not run the forward of nn.Conv1d, 2d or 3d, so it may "
                "compute something else; build its AffineConv from its weight and geometry"
            )
        return cls(
            weight=module.weight,
            bias=module.bias,
            stride=module.stride,
            padding=_module_padding(module),
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=_checked_padding_mode(module.padding_mode),
        )

    def to_module(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ConvNd | nn.Linear:
        """The plain torch module with copies of these tensors, cast once: ``conv.to_module()(x) == conv(x)``.

        Asymmetric padding becomes symmetric by growing the kernel with zeros. Without spatial dims it is an
        ``nn.Linear`` over ``[N, in_channels]``.
        """
        if not self.rank:
            return filled(*_to_linear_module(self), self.bias, device, dtype)
        even = with_symmetric_padding(self)
        with torch.device("meta"):
            module = CONV_CLASSES[even.rank](
                even.in_channels,
                even.out_channels,
                even.kernel_size,  # pyright: ignore[reportArgumentType]  # one class per rank
                even.stride,  # pyright: ignore[reportArgumentType]
                tuple(before for before, _ in even.padding),  # pyright: ignore[reportArgumentType]
                even.dilation,  # pyright: ignore[reportArgumentType]
                even.groups,
                bias=even.bias is not None,
                padding_mode=even.padding_mode,
            )
        return filled(module, even.weight, even.bias, device, dtype)


def unusual_geometry(conv: AffineConv) -> dict[str, Any]:
    """The geometry that differs from stride 1, no padding, dilation 1, one group: what a message should show."""
    shown: dict[str, Any] = {}
    if any(s != 1 for s in conv.stride):
        shown["stride"] = conv.stride
    if conv.pads:
        shown["padding"] = conv.padding
    if any(d != 1 for d in conv.dilation):
        shown["dilation"] = conv.dilation
    if conv.groups != 1:
        shown["groups"] = conv.groups
    if conv.pads and conv.padding_mode != "zeros":
        shown["padding_mode"] = conv.padding_mode
    return shown


def _checked_padding_mode(mode: str) -> PaddingMode:
    for known in PADDING_MODES:
        if mode == known:
            return known
    raise FoldError(f"got padding_mode={mode!r}; needed one of {', '.join(PADDING_MODES)}")


def _module_padding(module: ConvNd) -> tuple[Pair, ...]:
    if module.padding == "valid":
        return ()
    if isinstance(module.padding, str):  # "same": torch puts the odd one after
        return tuple((total // 2, total - total // 2) for total in reach(module.kernel_size, module.dilation))
    return tuple((p, p) for p in module.padding)


def with_symmetric_padding(conv: AffineConv) -> AffineConv:
    """The same convolution with equal padding on both sides, as torch's modules have it: zero taps on the shorter."""
    missing = tuple((max(after - before, 0), max(before - after, 0)) for before, after in conv.padding)
    return grow(conv, missing)


def grow(conv: AffineConv, margin: tuple[Pair, ...]) -> AffineConv:
    """Add zero taps so that the kernel reaches ``(before, after)`` pixels further: ``grow(c, m)(x) == c(x)``.

    Padding grows by the same margin. A dilation that does not divide a margin is densified first.
    """
    dilation = tuple(math.gcd(d, *pair) for d, pair in zip(conv.dilation, margin, strict=True))
    spread = tuple(old // new for old, new in zip(conv.dilation, dilation, strict=True))
    taps = tuple((before // d, after // d) for d, (before, after) in zip(dilation, margin, strict=True))
    padding = tuple((p + before, q + after) for (p, q), (before, after) in zip(conv.padding, margin, strict=True))
    weight = surround(insert_zeros(conv.weight, spread), taps)
    mode = conv.padding_mode if conv.pads else "zeros"
    return replace(conv, weight=weight, padding=padding, dilation=dilation, padding_mode=mode)


def _to_linear_module(conv: AffineConv) -> tuple[nn.Linear, Tensor]:
    blocks = conv.weight.chunk(conv.groups)
    dense: Tensor = torch.block_diag(*blocks)
    with torch.device("meta"):
        module = nn.Linear(conv.in_channels, conv.out_channels, bias=conv.bias is not None)
    return module, dense


def filled(
    module: Module,
    weight: Tensor,
    bias: Tensor | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Module:
    """A module made on the meta device, with contiguous copies of these tensors, each copied and cast in one pass."""

    def placed(tensor: Tensor) -> nn.Parameter:
        copied = tensor.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        return nn.Parameter(copied)

    module.weight = placed(weight)
    if bias is not None:
        module.bias = placed(bias)
    return module


def _flatten(conv: AffineConv) -> tuple[list[Any], tuple[Any, ...]]:
    return [conv.weight, conv.bias], (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)


def _unflatten(tensors: Any, geometry: tuple[Any, ...]) -> AffineConv:
    """Rebuild without validation: tree transformations put any object in a tensor's place."""
    conv = object.__new__(AffineConv)
    names = ("weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode")
    for name, value in zip(names, (*tensors, *geometry), strict=True):
        object.__setattr__(conv, name, value)
    return conv


pytree.register_pytree_node(
    AffineConv, _flatten, _unflatten, serialized_type_name="repblocks.fusion.affine_conv.AffineConv"
)
