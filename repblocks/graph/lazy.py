"""Values of the algebra that are known by geometry at once, and by numbers only where they are needed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from repblocks.fusion import add, compose, concat, identity, split_concat
from repblocks.fusion.affine_conv import AffineConv
from repblocks.fusion.transposed import AnyConv

FLOAT64 = torch.float64


class Lazy:
    """``shape`` is the value on the meta device, `numbers` the same value in float64 on the CPU, calculated once.

    The verbs look at no number, so what holds on the meta device holds for the numbers.

    Args:
        shape: The value on the meta device.
        make: The value in float64 on the CPU, from those of the parts.
        parts: What it is made of.
    """

    def __init__(self, shape: AnyConv, make: Callable[..., AnyConv], parts: "Sequence[Lazy]" = ()) -> None:
        self.shape, self.parts, self.is_unit = shape, tuple(parts), False
        self.terms: tuple[Lazy, ...] = (self,)
        self._make = make
        self._numbers: AnyConv | None = None

    def numbers(self) -> AnyConv:
        """The value in float64 on the CPU; chains may be longer than Python's stack."""
        waiting: list[Lazy] = [self]
        while waiting:
            missing = [part for part in waiting[-1].parts if part._numbers is None]
            waiting += missing
            if not missing:
                waiting.pop()._calculate()
        assert self._numbers is not None
        return self._numbers

    def _calculate(self) -> None:
        if self._numbers is None:
            self._numbers = self._make(*(part._numbers for part in self.parts))

    @property
    def is_pointwise(self) -> bool:
        """Whether every position is mapped by itself, so that the value commutes with views and means."""
        return isinstance(self.shape, AffineConv) and self.shape.is_pointwise

    @property
    def is_diagonal(self) -> bool:
        """Whether it only scales and shifts each channel."""
        return isinstance(self.shape, AffineConv) and self.shape.is_diagonal

    @property
    def is_square(self) -> bool:
        """Whether it is pointwise and writes as many channels as it reads."""
        return self.is_pointwise and self.shape.in_channels == self.shape.out_channels

    def flatten(self) -> "Lazy":
        """A pointwise value without its spatial dims."""
        return self if not self.shape.rank else lifted(AffineConv.flatten, self)


def lifted(verb: Callable[..., AnyConv], *parts: Lazy) -> Lazy:
    """Apply a verb to geometry now, to numbers later.

    Raises:
        FoldError: The verb refuses the geometry.
    """
    return Lazy(verb(*(part.shape for part in parts)), verb, parts)


def made(build: Callable[[Any], AnyConv]) -> Lazy:
    """A value from scratch: ``build(device)`` in float64."""
    return Lazy(build("meta"), lambda: build("cpu"))


def composed(first: Lazy, second: Lazy) -> Lazy:
    """``second(first(x))``; identities are left out."""
    if first.is_unit and first.shape.out_channels == second.shape.in_channels:
        return second
    if second.is_unit:
        return first
    shape = _scaled(first, second) or compose(first.shape, second.shape)
    return Lazy(shape, compose, (first, second))


def _scaled(first: Lazy, second: Lazy) -> AffineConv | None:
    """The geometry of a convolution behind which channels are scaled and shifted, as behind most."""
    conv, scale = first.shape, second.shape
    fits = second.is_diagonal and conv.out_channels == scale.in_channels and conv.rank >= scale.rank
    if not fits or not isinstance(conv, AffineConv):
        return None
    bias = conv.bias if scale.bias is None else torch.empty(conv.out_channels, dtype=FLOAT64, device="meta")
    return replace(conv, bias=bias)


def added(*parts: Lazy) -> Lazy:
    """The sum of parallel branches."""
    terms = tuple(term for part in parts for term in part.terms)
    total = Lazy(add(*(part.shape for part in parts)), add, terms)
    total.terms = terms
    return total


def concatenated(*parts: Lazy) -> Lazy:
    """Parallel branches, their outputs side by side."""
    return lifted(concat, *parts)


def side_by_side(*parts: Lazy) -> Lazy:
    """Branches over slices of the channels, in order."""
    return lifted(split_concat, *parts)


@lru_cache(maxsize=512)
def unit(channels: int) -> Lazy:
    """The identity."""
    one = made(lambda device: identity(channels, dtype=FLOAT64, device=device))
    one.is_unit = True
    return one


def selection(channels: int, start: int, stop: int) -> Lazy:
    """The channels ``start`` to ``stop``: a row of the identity for each."""
    return made(lambda device: AffineConv(weight=torch.eye(channels, dtype=FLOAT64, device=device)[start:stop]))
