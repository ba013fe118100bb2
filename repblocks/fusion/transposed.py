"""The transposed sibling of `AffineConv`."""

from dataclasses import dataclass, replace
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from repblocks.errors import FoldError
from repblocks.fusion.affine_conv import AffineConv, filled, grow
from repblocks.fusion.faithful import is_faithful
from repblocks.fusion.geometry import Pair, flat_padding, reach

ConvTransposeNd = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONV_TRANSPOSE_CLASSES: dict[int, type[ConvTransposeNd]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True, repr=False)
class AffineConvTranspose:
    """A linear piece that upsamples: ``conv(x) == crop(transposed_convolution(x, weight)) + bias``.

    Input pixel ``i`` writes, by tap ``j``, to output pixel ``stride * i + dilation * j - padding[0]``. Immutable, a
    pytree, and differentiable, as `AffineConv` is.

    Args:
        weight: ``[in_channels, out_channels / groups, *kernel_size]``, torch's layout, with 1 to 3 spatial dims.
        bias: ``[out_channels]``, or None: structurally absent.
        stride: Per spatial dim; ``()`` means 1.
        padding: Pixels ``(before, after)`` cut off the full output per spatial dim; ``()`` means none. A negative
            number adds pixels that hold the bias: torch's ``padding=p, output_padding=q`` is ``(p, p - q)``.
        dilation: Per spatial dim; ``()`` means 1.
        groups: Divides both channel counts.

    Raises:
        FoldError: Shapes, dtypes and geometry do not fit each other.

    Source: Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning",
    https://arxiv.org/abs/1603.07285, chapter 4.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[Pair, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        rank = self.weight.ndim - 2
        if not 1 <= rank <= 3 or 0 in self.weight.shape:
            raise FoldError(f"got a weight of shape {tuple(self.weight.shape)}; needed [I, O / groups, *kernel_size]")
        if self.groups < 1 or self.in_channels % self.groups:
            raise FoldError(f"groups={self.groups} must be positive and divide the {self.in_channels} in channels")
        if self.bias is not None and (self.bias.shape != (self.out_channels,) or self.bias.dtype != self.weight.dtype):
            raise FoldError(
                f"got a bias {tuple(self.bias.shape)} of {self.bias.dtype}; "
                f"needed ({self.out_channels},) of the weight's {self.weight.dtype}"
            )
        self._complete_geometry(rank)

    def _complete_geometry(self, rank: int) -> None:
        for name, default in (("stride", 1), ("padding", (0, 0)), ("dilation", 1)):
            given = getattr(self, name)
            fits = isinstance(given, tuple) and len(given) in (0, rank)
            if not fits or not all(isinstance(entry, type(default)) for entry in given):
                raise FoldError(f"got {name}={given!r}; needed a tuple of {rank} entries like {default!r}, or ()")
            object.__setattr__(self, name, given or (default,) * rank)
        if any(n < 1 for n in (*self.stride, *self.dilation)):
            raise FoldError(f"{self!r} needs stride and dilation >= 1")

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the transposed convolution to ``[N, in_channels, *size]``: the reference meaning of the value."""
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.rank - 1]
        if _is_torch_geometry(self):
            sides, extra = _torch_padding(self)
            return convolve(x, self.weight, self.bias, self.stride, sides, extra, self.groups, self.dilation)
        full = convolve(x, self.weight, None, self.stride, 0, 0, self.groups, self.dilation)
        cropped = F.pad(full, [-side for side in flat_padding(self.padding)])
        return cropped if self.bias is None else cropped + self.bias.reshape(-1, *(1,) * self.rank)

    def __repr__(self) -> str:
        usual = {
            "stride": (1,) * self.rank,
            "padding": ((0, 0),) * self.rank,
            "dilation": (1,) * self.rank,
            "groups": 1,
        }
        geometry = {name: getattr(self, name) for name in ("kernel_size", *usual)}
        shown = "".join(f", {name}={value}" for name, value in geometry.items() if value != usual.get(name))
        bias = ", bias" if self.bias is not None else ""
        return f"AffineConvTranspose({self.in_channels}->{self.out_channels}{shown}{bias})"

    @property
    def rank(self) -> int:
        """Number of spatial dims, 1 to 3."""
        return self.weight.ndim - 2

    @property
    def in_channels(self) -> int:
        """Channels read."""
        return self.weight.shape[0]

    @property
    def out_channels(self) -> int:
        """Channels written."""
        return self.weight.shape[1] * self.groups

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
        """Whether any side of the full output is cut or extended."""
        return any(map(any, self.padding))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "AffineConvTranspose":
        """The same value on another device or in another dtype."""
        bias = None if self.bias is None else self.bias.to(device=device, dtype=dtype)
        return replace(self, weight=self.weight.to(device=device, dtype=dtype), bias=bias)

    def promote(self, rank: int) -> NoReturn:
        """Refuse: what takes ordinary convolutions promotes them to its rank, and would misread this weight.

        Raises:
            FoldError: Always.
        """
        raise FoldError(f"{self!r} is a transposed convolution; needed an ordinary one")

    @classmethod
    def from_module(cls, module: ConvTransposeNd) -> Self:
        """The value of a transposed convolution module: ``AffineConvTranspose.from_module(m)(x) == m(x)``.

        Live parameters are referenced, not copied, so gradients reach them.

        Raises:
            FoldError: It is a subclass with a forward of its own, or carries forward hooks.
        """
        if not any(is_faithful(module, conv) for conv in CONV_TRANSPOSE_CLASSES.values() if isinstance(module, conv)):
            raise FoldError(
                f"{type(module).__name__} is hooked, or does not run the forward of nn.ConvTranspose1d, 2d or 3d, so "
                "it may compute something else; build its AffineConvTranspose from its weight and geometry"
            )
        assert not isinstance(module.padding, str)
        return cls(
            weight=module.weight,
            bias=module.bias,
            stride=module.stride,
            padding=tuple((p, p - extra) for p, extra in zip(module.padding, module.output_padding, strict=True)),
            dilation=module.dilation,
            groups=module.groups,
        )

    def to_module(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ConvTransposeNd:
        """The plain torch module with copies of these tensors, cast once: ``conv.to_module()(x) == conv(x)``.

        Padding that torch cannot express becomes expressible by growing the kernel with zeros.
        """
        even = _with_torch_geometry(self)
        sides, extra = _torch_padding(even)
        with torch.device("meta"):
            module = CONV_TRANSPOSE_CLASSES[even.rank](
                even.in_channels,
                even.out_channels,
                even.kernel_size,  # pyright: ignore[reportArgumentType]  # one class per rank
                even.stride,  # pyright: ignore[reportArgumentType]
                sides,  # pyright: ignore[reportArgumentType]
                extra,  # pyright: ignore[reportArgumentType]
                even.groups,
                even.bias is not None,
                even.dilation,  # pyright: ignore[reportArgumentType]
            )
        return filled(module, even.weight, even.bias, device, dtype)


AnyConv = AffineConv | AffineConvTranspose


def on_spread_input(conv: AffineConvTranspose) -> AffineConv:
    """What a transposed convolution does to its input with ``stride - 1`` zeros between pixels, without the padding.

    It is an ordinary convolution of stride 1; on each side, what it would pad and what the transposed one cuts off add
    up to the reach.
    """
    weight = _swapped(conv.weight, conv.groups)
    return AffineConv(weight=weight, bias=conv.bias, dilation=conv.dilation, groups=conv.groups)


def from_spread_input(conv: AffineConv, stride: tuple[int, ...], padding: tuple[Pair, ...]) -> AffineConvTranspose:
    """The inverse of `on_spread_input`, with the stride and the padding given."""
    return AffineConvTranspose(
        weight=_swapped(conv.weight, conv.groups),
        bias=conv.bias,
        stride=stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
    )


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """In and out channels of each group exchanged, taps reversed: its own inverse."""
    blocks = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return blocks.flatten(0, 1).flip(tuple(range(2, weight.ndim)))


def _torch_padding(conv: AffineConvTranspose) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``padding`` and ``output_padding`` of torch's modules."""
    return tuple(p for p, _ in conv.padding), tuple(p - q for p, q in conv.padding)


def _is_torch_geometry(conv: AffineConvTranspose) -> bool:
    """Whether torch's arguments express the padding."""
    sides = zip(*_torch_padding(conv), conv.stride, conv.dilation, strict=True)
    return all(p >= 0 and 0 <= extra < max(s, d) for p, extra, s, d in sides)


def _with_torch_geometry(conv: AffineConvTranspose) -> AffineConvTranspose:
    if _is_torch_geometry(conv):
        return conv
    margin = tuple(_torch_margin(*sizes) for sizes in zip(conv.padding, conv.stride, conv.dilation, strict=True))
    grown = grow(on_spread_input(conv), tuple((after, before) for before, after in margin))
    padding = tuple((p + before, q + after) for (p, q), (before, after) in zip(conv.padding, margin, strict=True))
    return from_spread_input(grown, conv.stride, padding)


def _torch_margin(padding: Pair, stride: int, dilation: int) -> Pair:
    """Zeros to grow a kernel by, before and after, until torch's arguments express its padding.

    They are multiples of the dilation, so that the kernel stays dilated.
    """
    before = _at_least(max(0, -padding[0], padding[1] - padding[0]), dilation)
    extra = padding[0] + before - padding[1]
    return before, _at_least(max(0, extra - max(stride, dilation) + 1), dilation)


def _at_least(number: int, factor: int) -> int:
    """The smallest multiple of ``factor`` from ``number`` on."""
    return -(-number // factor) * factor


def _flatten(conv: AffineConvTranspose) -> tuple[list[Any], tuple[Any, ...]]:
    return [conv.weight, conv.bias], (conv.stride, conv.padding, conv.dilation, conv.groups)


def _unflatten(tensors: Any, geometry: tuple[Any, ...]) -> AffineConvTranspose:
    """Rebuild without validation: tree transformations put any object in a tensor's place."""
    conv = object.__new__(AffineConvTranspose)
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    for name, value in zip(names, (*tensors, *geometry), strict=True):
        object.__setattr__(conv, name, value)
    return conv


pytree.register_pytree_node(
    AffineConvTranspose,
    _flatten,
    _unflatten,
    serialized_type_name="repblocks.fusion.transposed.AffineConvTranspose",
)
