"""What is known of a tensor in the graph: one convolution of an earlier tensor, and views between the two."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import fx

from repblocks.errors import FoldError
from repblocks.fusion import macs
from repblocks.fusion.affine_conv import AffineConv, with_symmetric_padding
from repblocks.graph.lazy import Lazy, added, composed, concatenated, selection, side_by_side


class Anchor(NamedTuple):
    """The channels ``start`` to ``stop`` of a tensor."""

    node: fx.Node
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Form:
    """A tensor as ``views(value(anchor))`` if the value ``leads``, else as ``value(views(anchor))``.

    Views are operations that move or average positions and leave the channels apart; pointwise values commute
    with them.

    Attributes:
        anchor: What is read.
        value: What is calculated.
        axis: Where the channels are in what the value reads.
        out_axis: Where they are in the result.
        views: Nodes, in order.
        leads: Whether the value comes before the views; without views it makes no difference.
        passed: The views, and those that undid each other: what may stay in the code.
    """

    anchor: Anchor
    value: Lazy
    axis: int
    out_axis: int
    views: tuple[fx.Node, ...] = ()
    leads: bool = True
    passed: tuple[fx.Node, ...] = ()

    @property
    def place(self) -> tuple[object, ...]:
        """Forms of the same place differ only in their values."""
        return (self.anchor, self.views, self.leads, self.axis, self.out_axis)

    def then(self, atom: Lazy) -> "Form":
        """Apply another value to the result.

        Raises:
            FoldError: The two are not one convolution.
        """
        if self.views and self.leads:
            if not (atom.is_pointwise and atom.shape.in_channels == atom.shape.out_channels):
                raise FoldError(f"{atom.shape!r} cannot move before {_names(self.views)}")
            atom = atom.flatten()
        return replace(self, value=composed(self.value, atom))

    def viewed(self, view: fx.Node, axis: int) -> "list[Form]":
        """The forms behind one more view, which leaves the channels at ``axis``."""
        views, found = (*self.views, view), list[Form]()
        passed = (*self.passed, view)
        if self.leads:
            found.append(replace(self, views=views, passed=passed, out_axis=axis))
        if (not self.views or not self.leads) and self.value.is_square and not self.value.is_unit:
            value = self.value.flatten()
            trailing = replace(self, value=value, views=views, passed=passed, axis=axis, out_axis=axis, leads=False)
            found.append(trailing)
        return found

    def over(self, channels: int) -> "Form":
        """The same tensor as a convolution of all ``channels`` of the anchor's node."""
        node, start, stop = self.anchor
        if stop - start == channels:
            return self
        value = composed(selection(channels, start, stop), self.value)
        return replace(self, anchor=Anchor(node, 0, channels), value=value)


def _names(views: Sequence[fx.Node]) -> str:
    return ", ".join(str(view) for view in views)


ChannelsOf = Callable[[Form], int]


def sums(branches: Sequence[Sequence[Form]], channels_of: ChannelsOf, refused: list[str]) -> list[Form]:
    """The sum of tensors, from the forms that they share; ``refused`` collects why some do not add up."""

    def merge(group: Sequence[Form]) -> Form:
        same = group if len({form.anchor for form in group}) == 1 else [f.over(channels_of(f)) for f in group]
        return replace(same[0], value=added(*(form.value for form in same)))

    return _merged(merge, branches, refused)


def concatenations(branches: Sequence[Sequence[Form]], channels_of: ChannelsOf, refused: list[str]) -> list[Form]:
    """Tensors side by side, from the forms that they share; ``refused`` collects why some do not go together."""

    def merge(group: Sequence[Form]) -> Form:
        anchors = [form.anchor for form in group]
        if len(set(anchors)) > 1 and all(a.stop == b.start for a, b in pairwise(anchors)):
            whole = Anchor(anchors[0].node, anchors[0].start, anchors[-1].stop)
            return replace(group[0], anchor=whole, value=side_by_side(*(form.value for form in group)))
        same = group if len(set(anchors)) == 1 else [form.over(channels_of(form)) for form in group]
        return replace(same[0], value=concatenated(*(form.value for form in same)))

    return _merged(merge, branches, refused)


def _merged(
    merge: Callable[[Sequence[Form]], Form], branches: Sequence[Sequence[Form]], refused: list[str]
) -> list[Form]:
    found = list[Form]()
    for group in _shared(branches):
        try:
            found.append(merge(group))
        except FoldError as error:
            refused.append(str(error))
    return found


def _shared(branches: Sequence[Sequence[Form]]) -> list[list[Form]]:
    """One form of each branch, for every node and place that all have in common."""

    def of(form: Form) -> tuple[object, ...]:
        return (form.anchor.node, *form.place[1:])

    groups = list[list[Form]]()
    for first in branches[0]:
        matches = [[form for form in branch if of(form) == of(first)] for branch in branches[1:]]
        if all(matches):
            groups.append([first, *(_nearest(first.anchor, forms) for forms in matches)])
    return groups


def _nearest(anchor: Anchor, forms: Sequence[Form]) -> Form:
    """Over the same channels if there is one."""
    return next((form for form in forms if form.anchor == anchor), forms[0])


class Cost(NamedTuple):
    """What is compared: multiply-accumulates, then weights (biases are free), then passes over the map."""

    macs: int = 0
    weights: int = 0
    passes: int = 0

    def plus(self, other: "Cost") -> "Cost":
        """Both."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


def price(value: Lazy, size: torch.Size, axis: int) -> Cost:
    """What it costs to apply a value to a tensor of this size with its channels at ``axis``.

    Scales and shifts count no multiply-accumulates, as torch's FLOP counter has it.
    """
    shape = value.shape
    if value.is_diagonal:
        return Cost(0, shape.out_channels, 1)
    if not shape.rank:
        weight = shape.in_channels * shape.out_channels if is_last(size, axis) else shape.weight.numel()
        return Cost(size.numel() // shape.in_channels * weight, weight, 1)
    if isinstance(shape, AffineConv):
        shape = with_symmetric_padding(shape)
    return Cost(size[0] * macs(shape, tuple(size[2:])), shape.weight.numel(), 1)


def is_last(size: torch.Size, axis: int) -> bool:
    """Whether the channels are where ``nn.Linear`` reads them."""
    return axis == len(size) - 1
