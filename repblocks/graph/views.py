"""Views, slices and averages: what moves, picks or averages positions and treats all channels alike."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from repblocks.graph import operators as ops
from repblocks.graph.analysis import Analysis
from repblocks.graph.atoms import called_layer, layer_value
from repblocks.graph.forms import Anchor, Cost, Form
from repblocks.graph.lazy import FLOAT64, made, selection, unit
from repblocks.graph.running import apply


def view(analysis: Analysis, node: fx.Node) -> None:
    """What a view, a slice or an average means for the forms of its result."""
    base = _viewed(analysis, node)
    if base is None:
        return
    found = [form for axis in analysis.axes(base) for form in _views_of(analysis, node, base, axis)]
    averages = node.target not in ops.MOVES and not isinstance(called_layer(analysis, node), nn.Flatten | nn.Unflatten)
    if found:
        analysis.learn(node, found, Cost(passes=int(averages)))
    _pooled(analysis, node, base)


def _viewed(analysis: Analysis, node: fx.Node) -> fx.Node | None:
    """The tensor that a view is of, behind the tuples that chunk and split return."""
    base = node.all_input_nodes[0] if node.all_input_nodes else None
    while isinstance(base, fx.Node) and isinstance(analysis.values.get(base), tuple | list):
        base = base.all_input_nodes[0] if base.target in ops.VIEWS and base.all_input_nodes else None
    return base if analysis.is_tensor(base) else None


def _views_of(analysis: Analysis, node: fx.Node, base: fx.Node, axis: int) -> list[Form]:
    forms = analysis.at(base, axis)
    channels = analysis.values[base].shape[axis]
    seen = _probe(analysis, node, base, axis) if forms and channels > 1 else None
    if seen is None:
        return []
    out_axis, start, stop = seen
    if stop - start == channels:
        return [_without_round_trip(analysis, viewed) for form in forms for viewed in form.viewed(node, out_axis)]
    if out_axis != axis or not _keeps_positions(analysis, node, base, axis):
        return []
    own = Form(anchor=Anchor(base, start, stop), value=unit(stop - start), axis=axis, out_axis=axis)
    picked = [form.then(selection(channels, start, stop)) for form in forms if not form.views]
    return [own, *picked]


def _without_round_trip(analysis: Analysis, form: Form) -> Form:
    """Views that undo each other, such as two transposes, are none."""
    size = analysis.values[form.anchor.node].shape
    same = len(form.views) > 1 and analysis.values[form.views[-1]].shape == size
    if not same or not all(view.target in ops.MOVES for view in form.views):
        return form
    places = torch.arange(size.numel()).view(size)
    seen = places
    for before, view in zip([form.anchor.node, *form.views], form.views, strict=False):
        seen = _view_again(analysis, view, before, seen)
    return replace(form, views=(), leads=True) if not seen.is_meta and torch.equal(seen, places) else form


def _keeps_positions(analysis: Analysis, node: fx.Node, base: fx.Node, axis: int) -> bool:
    before, after = list(analysis.values[base].shape), list(analysis.values[node].shape)
    return before[:axis] + before[axis + 1 :] == after[:axis] + after[axis + 1 :]


def _probe(analysis: Analysis, node: fx.Node, base: fx.Node, axis: int) -> tuple[int, int, int] | None:
    """Where the channels go, found by viewing their numbers: axis, first channel, last channel + 1."""
    size = analysis.values[base].shape
    numbered = torch.arange(size[axis], dtype=FLOAT64).view(-1, *(1,) * (len(size) - axis - 1)).expand(size)
    try:
        with torch.no_grad():
            seen = _view_again(analysis, node, base, numbered)
    except (RuntimeError, TypeError, IndexError):  # it needs the numbers of other tensors
        return None
    if not isinstance(seen, Tensor) or seen.is_meta or not seen.numel():
        return None
    start = round(seen.flatten()[0].item())
    for out_axis, count in enumerate(seen.shape):
        expected = start + torch.arange(count, dtype=FLOAT64).view(-1, *(1,) * (seen.ndim - out_axis - 1))
        if count > 1 and torch.allclose(seen, expected.expand(seen.shape), atol=1e-6, rtol=0):
            return out_axis, start, start + count
    return None


def _view_again(analysis: Analysis, node: fx.Node, base: fx.Node, tensor: Tensor) -> Any:
    def value(read: fx.Node) -> Any:
        if read is base:
            return tensor
        known = analysis.values.get(read)
        return _view_again(analysis, read, base, tensor) if isinstance(known, tuple | list) else known

    args, kwargs = map_arg((node.args, node.kwargs), value)  # pyright: ignore[reportArgumentType]
    return apply(node, analysis.shadow, args, kwargs)


def _pooled(analysis: Analysis, node: fx.Node, base: fx.Node) -> None:
    """Average pooling by windows of one size is a convolution too."""
    layer, size = called_layer(analysis, node), analysis.values[base].shape
    if len(size) < 3:
        return
    if layer is not None and isinstance(layer, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
        atom = layer_value(analysis, str(node.target), size[1])
    elif node.target in ops.POOLS and ops.is_fixed(ops.arguments(node)):
        atom = made(partial(ops.pooling, node.target, size[1], ops.arguments(node)))
    else:
        return
    if atom.shape.rank == len(size) - 2:
        analysis.chain(node, base, atom, 1)
