"""The geometry of a block, normalised once: what `nn.Conv2d`'s arguments mean for every branch inside."""

from dataclasses import dataclass, replace
from typing import Literal, TypedDict, Unpack

from repblocks.errors import ConfigurationError
from repblocks.fusion.affine_conv import PADDING_MODES, PaddingMode
from repblocks.fusion.geometry import Pair
from repblocks.names import known_name

Padding = int | Pair | tuple[Pair, Pair] | Literal["same", "valid"] | None
Identity = Literal["auto", "always", "never"]


NO_PADDING = ((0, 0), (0, 0))


class Geometry(TypedDict, total=False):
    """`nn.Conv2d`'s arguments beyond channels and kernel size.

    ``padding`` may be given per side, ``((top, bottom), (left, right))``; None and "same" keep the grid at stride 1.
    """

    stride: int | Pair
    padding: Padding
    dilation: int | Pair
    groups: int
    padding_mode: PaddingMode


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvSpec:
    """The 2d convolution that a block stands for, every size a pair ``(height, width)``.

    ``padding`` is ``((top, bottom), (left, right))``.
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: tuple[Pair, Pair]
    dilation: Pair
    groups: int
    padding_mode: PaddingMode

    @classmethod
    def of(
        cls, in_channels: int, out_channels: int, kernel_size: int | Pair, **geometry: Unpack[Geometry]
    ) -> "ConvSpec":
        """Normalise `nn.Conv2d`'s arguments.

        Raises:
            ConfigurationError: They do not describe a convolution.
        """
        for argument in geometry:
            known_name("argument", argument, Geometry.__annotations__)
        kernel, dilation = _pair(kernel_size), _pair(geometry.get("dilation", 1))
        spec = cls(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel,
            stride=_pair(geometry.get("stride", 1)),
            padding=_sides(geometry.get("padding"), kernel, dilation),
            dilation=dilation,
            groups=geometry.get("groups", 1),
            padding_mode=geometry.get("padding_mode", "zeros"),
        )
        spec._validate()
        return spec

    def _validate(self) -> None:
        sizes = (self.in_channels, self.out_channels, self.groups, *self.kernel_size, *self.stride, *self.dilation)
        if any(size < 1 for size in sizes) or any(p < 0 for pair in self.padding for p in pair):
            raise ConfigurationError(f"{self} needs positive sizes and padding >= 0")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ConfigurationError(f"{self}: groups must divide in_channels and out_channels")
        if self.padding_mode not in PADDING_MODES:
            raise ConfigurationError(f"{self}: padding_mode must be one of {', '.join(PADDING_MODES)}")

    @property
    def keeps_the_map(self) -> bool:
        """Whether input and output have the same shape, so that an identity branch fits."""
        whole = all(
            sum(p) == d * (k - 1) for p, d, k in zip(self.padding, self.dilation, self.kernel_size, strict=True)
        )
        return whole and self.stride == (1, 1) and self.in_channels == self.out_channels

    def has_identity(self, identity: Identity) -> bool:
        """Whether a block has its identity branch: where it fits ("auto"), certainly ("always"), or "never".

        Raises:
            ConfigurationError: "always" where the shapes of input and output differ, or an unknown choice.
        """
        known_name("identity", identity, ("auto", "always", "never"))
        if identity == "always" and not self.keeps_the_map:
            raise ConfigurationError(f'{self} changes the shape of the map, so no identity fits; use identity="auto"')
        return identity != "never" and self.keeps_the_map

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return self.groups == self.in_channels == self.out_channels

    def shrunk(self, by: int) -> Pair:
        """The kernel size less some taps, at least 1 per side."""
        return max(self.kernel_size[0] - by, 1), max(self.kernel_size[1] - by, 1)

    def depthwise(self, channels: int) -> "ConvSpec":
        """The same geometry over some channels, one group each."""
        return replace(self, in_channels=channels, out_channels=channels, groups=channels)

    def window(self, kernel_size: Pair, dilation: Pair) -> tuple[Pair, Pair]:
        """The padding that centres another kernel in this one; negative where it starts inside the map."""
        top, left = (
            _centred(p, d, d * (old - 1) - spacing * (new - 1))
            for p, d, old, spacing, new in zip(
                self.padding, self.dilation, self.kernel_size, dilation, kernel_size, strict=True
            )
        )
        return top, left


def _centred(padding: Pair, dilation: int, surplus: int) -> Pair:
    """Half of the surplus cut off before, in whole steps of the dilation, and the rest after."""
    before = surplus // (2 * dilation) * dilation
    return padding[0] - before, padding[1] - (surplus - before)


def _pair(size: int | Pair) -> Pair:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _sides(padding: Padding, kernel_size: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    if padding is None or padding == "same":
        height, width = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
        return (height // 2, height - height // 2), (width // 2, width - width // 2)
    if isinstance(padding, str):
        known_name("padding", padding, ("same", "valid"))
        padding = 0
    height, width = (padding, padding) if isinstance(padding, int) else padding
    return _pair(height), _pair(width)
