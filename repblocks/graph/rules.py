"""What each linear layer, function and method means for the forms of its result."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]  # base of every convolution

from repblocks.errors import FoldError
from repblocks.fusion import AffineConv, fold, scale
from repblocks.fusion.constructors import normalised
from repblocks.graph import operators as ops
from repblocks.graph.analysis import Analysis
from repblocks.graph.atoms import has_tensors, layer_value
from repblocks.graph.forms import Cost, Form, concatenations, sums
from repblocks.graph.lazy import FLOAT64, Lazy, made
from repblocks.graph.views import view

Rule = Callable[[Analysis, fx.Node], None]


def analyse(analysis: Analysis) -> Analysis:
    """Visit every node in order."""
    for node in analysis.trace.nodes:
        if _is_constant(analysis, node):
            analysis.constants.add(node)
        elif (rule := _rule_for(analysis, node)) and node not in analysis.barred and analysis.is_tensor(node):
            try:
                rule(analysis, node)
            except FoldError as error:
                analysis.refusals[node] = str(error)
    return analysis


def _is_constant(analysis: Analysis, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return isinstance(analysis.values[node], Tensor)
    reads = node.all_input_nodes
    pure = node.op in ("call_function", "call_method") and node not in analysis.barred
    return pure and bool(reads) and all(read in analysis.constants for read in reads)


def _rule_for(analysis: Analysis, node: fx.Node) -> Rule | None:
    if node.op != "call_module":
        return FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    path = str(node.target)
    if path in analysis.trace.sealed or len(node.args) + len(node.kwargs) != 1 or not node.all_input_nodes:
        return None
    layer = analysis.shadow.get_submodule(path)
    if isinstance(layer, ops.PAD_LAYERS):
        return _pad_layer
    if isinstance(layer, ops.VIEW_LAYERS):
        return view
    return _layer if fold.applies_to(layer) else None


def _layer(analysis: Analysis, node: fx.Node) -> None:
    """A layer with a rule of `fold`."""
    path, read = str(node.target), node.all_input_nodes[0]
    if not analysis.is_tensor(read):
        return
    layer, size = analysis.shadow.get_submodule(path), analysis.values[read].shape
    axis = len(size) - 1 if isinstance(layer, nn.Linear) else 1
    atom = layer_value(analysis, path, size[axis]) if len(size) > 1 else None
    if atom is None or atom.shape.rank not in (0, len(size) - 2):
        return
    weights = sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))
    if not has_tensors(layer) and _is_unit(atom):
        _pass_on(analysis, node, read)
    else:
        counts = isinstance(layer, _ConvNd) or (not atom.is_diagonal and has_tensors(layer))
        analysis.chain(node, read, atom, axis, weights=weights, counts=counts)


def _is_unit(atom: Lazy) -> bool:
    """Whether a layer without parameters does nothing."""
    return atom.is_diagonal and atom.shape.bias is None and bool((atom.numbers().weight == 1).all())


def _pass_on(analysis: Analysis, node: fx.Node, read: Any) -> None:
    """What returns its argument has the forms of that, the trivial ones included."""
    axes = analysis.axes(read) if analysis.is_tensor(read) else ()
    forms = [form for axis in axes for form in analysis.at(read, axis)]
    if forms:
        analysis.learn(node, forms, Cost())


def _copy(analysis: Analysis, node: fx.Node) -> None:
    _pass_on(analysis, node, node.all_input_nodes[0])


def _dropout(analysis: Analysis, node: fx.Node) -> None:
    given = ops.arguments(node)
    if given.get("training", True) is False:
        _pass_on(analysis, node, given["input"])


# Functions with weights


def _convolution(analysis: Analysis, node: fx.Node) -> None:
    given = ops.arguments(node)
    rank = ops.CONVOLUTIONS[node.target]  # pyright: ignore[reportArgumentType]
    read, constants = given.get("input"), (given.get("weight"), given.get("bias"))
    fits = analysis.is_tensor(read) and analysis.values[read].ndim == rank + 2
    if fits and _are_constant(analysis, *constants) and ops.is_fixed(given):
        atom = analysis.lazily(partial(ops.convolution, rank, given), *constants)
        analysis.chain(node, read, atom, 1, weights=_numel(analysis, constants[0]), counts=True)


def _linear(analysis: Analysis, node: fx.Node) -> None:
    given = ops.arguments(node)
    read, constants = given.get("input"), (given.get("weight"), given.get("bias"))
    if _are_constant(analysis, *constants) and analysis.is_tensor(read) and analysis.values[read].ndim > 1:
        atom = analysis.lazily(lambda weight, bias: AffineConv(weight=weight, bias=bias), *constants)
        axis = analysis.values[read].ndim - 1
        analysis.chain(node, read, atom, axis, weights=_numel(analysis, constants[0]), counts=True)


def _batch_norm(analysis: Analysis, node: fx.Node) -> None:
    given = ops.arguments(node)
    constants = [given.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
    if given.get("training", False) is not False or not _are_constant(analysis, *constants):
        raise FoldError("it normalises by each batch, so it is not a convolution")
    atom = analysis.lazily(partial(normalised, eps=given.get("eps", 1e-5)), *constants)
    analysis.chain(node, given["input"], atom, 1, weights=_numel(analysis, constants[2]))


def _are_constant(analysis: Analysis, *arguments: Any) -> bool:
    return all(argument is None or argument in analysis.constants for argument in arguments)


def _pad(analysis: Analysis, node: fx.Node) -> None:
    _padded(analysis, node, ops.arguments(node))


def _pad_layer(analysis: Analysis, node: fx.Node) -> None:
    layer = analysis.shadow.get_submodule(str(node.target))
    _padded(analysis, node, {"input": node.all_input_nodes[0], **ops.pad_layer(layer)})


def _padded(analysis: Analysis, node: fx.Node, given: dict[str, Any]) -> None:
    read = given["input"]
    if not analysis.is_tensor(read) or not ops.is_fixed(given):
        return
    size = analysis.values[read].shape
    if len(size) > 2:
        atom = made(partial(ops.padding, size[1], len(size) - 2, given))
        analysis.chain(node, read, atom, 1)


# Arithmetic


def _added(analysis: Analysis, node: fx.Node) -> None:
    _add_with(analysis, node, 1.0)


def _subtracted(analysis: Analysis, node: fx.Node) -> None:
    _add_with(analysis, node, -1.0)


def _add_with(analysis: Analysis, node: fx.Node, sign: float) -> None:
    """``a + sign * alpha * b``."""
    a, b = _operands(node)
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, int | float):
        return
    if analysis.is_tensor(a) and analysis.is_tensor(b):
        _joined(analysis, node, a, b, sign * alpha)
    elif analysis.is_tensor(a):
        _shifted(analysis, node, a, 1.0, b, sign * alpha)
    else:
        _shifted(analysis, node, b, sign * alpha, a, 1.0)


def _multiplied(analysis: Analysis, node: fx.Node) -> None:
    a, b = _operands(node)
    tensor, constant = (a, b) if analysis.is_tensor(a) else (b, a)
    _scaled(analysis, node, tensor, constant, lambda number: number)


def _divided(analysis: Analysis, node: fx.Node) -> None:
    tensor, constant = _operands(node)
    if "rounding_mode" not in node.kwargs:
        _scaled(analysis, node, tensor, constant, lambda number: 1 / number)


def _negated(analysis: Analysis, node: fx.Node) -> None:
    _scaled(analysis, node, node.all_input_nodes[0], -1.0, lambda number: number)


def _operands(node: fx.Node) -> tuple[Any, Any]:
    """The two arguments, of which the second may be called ``other``."""
    second = node.kwargs.get("other", node.args[1] if len(node.args) == 2 else None)
    return node.args[0] if node.args else node.kwargs.get("input"), second


def _joined(analysis: Analysis, node: fx.Node, a: fx.Node, b: fx.Node, sign: float) -> None:
    """The sum or difference of two tensors, where both are convolutions of one."""
    if analysis.values[a].shape != analysis.values[b].shape:
        return
    found, refused = list[Form](), list[str]()
    for axis in analysis.axes(a):
        factor = made(partial(_factor, analysis.values[a].shape[axis], sign))
        second = [form if sign == 1 else form.then(factor) for form in analysis.at(b, axis)]
        found += sums([analysis.at(a, axis), second], partial(_channels, analysis), refused)
    _learn_join(analysis, node, found, refused, Cost(passes=1))


def _learn_join(analysis: Analysis, node: fx.Node, found: list[Form], refused: list[str], cost: Cost) -> None:
    if found:
        analysis.learn(node, found, cost)
    elif refused:
        analysis.refusals[node] = refused[0]


def _channels(analysis: Analysis, form: Form) -> int:
    """Of the node that a form is anchored in."""
    return analysis.values[form.anchor.node].shape[form.axis]


def _factor(channels: int, factor: float, device: str) -> AffineConv:
    return scale(torch.full((channels,), factor, dtype=FLOAT64, device=device))


def _shifted(analysis: Analysis, node: fx.Node, tensor: Any, factor: float, constant: Any, sign: float) -> None:
    """``factor * tensor + sign * constant``."""
    if factor == 1 and isinstance(constant, int | float) and constant == 0:
        _pass_on(analysis, node, tensor)
        if node in analysis.costs:
            analysis.costs[node] = Cost(passes=1)
        return
    for axis in _channel_axes(analysis, node, tensor, constant):
        build = partial(_shift, analysis.values[node].shape[axis], factor, sign)
        analysis.chain(node, tensor, analysis.lazily(build, constant), axis)


def _shift(channels: int, factor: float, sign: float, number: Any) -> AffineConv:
    bias = sign * _per_channel(number, channels)
    weight = torch.full((channels, 1), factor, dtype=FLOAT64, device=bias.device)
    return AffineConv(weight=weight, bias=bias, groups=channels)


def _scaled(analysis: Analysis, node: fx.Node, tensor: Any, constant: Any, factor: Callable[[Any], Any]) -> None:
    """``factor(constant) * tensor``."""
    for axis in _channel_axes(analysis, node, tensor, constant):
        build = partial(_scale, analysis.values[node].shape[axis], factor)
        weights = _numel(analysis, constant)
        analysis.chain(node, tensor, analysis.lazily(build, constant), axis, weights=weights)


def _scale(channels: int, factor: Callable[[Any], Any], number: Any) -> AffineConv:
    return scale(_per_channel(factor(number), channels))


def _numel(analysis: Analysis, constant: Any) -> int:
    return analysis.values[constant].numel() if isinstance(constant, fx.Node) else 0


def _channel_axes(analysis: Analysis, node: fx.Node, tensor: Any, constant: Any) -> Sequence[int]:
    """Where a constant varies from channel to channel; anywhere if it is one number; nowhere if it varies otherwise."""
    known = isinstance(constant, int | float) or (isinstance(constant, fx.Node) and constant in analysis.constants)
    if not known or not analysis.is_tensor(tensor) or analysis.values[tensor].shape != analysis.values[node].shape:
        return ()
    size = analysis.values[node].shape
    if isinstance(constant, int | float) or analysis.values[constant].numel() == 1:
        return analysis.axes(node)
    shape = analysis.values[constant].shape
    varying = [axis - len(shape) + len(size) for axis, count in enumerate(shape) if count > 1]
    return varying if len(varying) == 1 and varying[0] in analysis.axes(node) else ()


def _per_channel(number: Any, channels: int) -> Tensor:
    tensor = torch.as_tensor(number, dtype=FLOAT64).flatten()
    return tensor.expand(channels) if tensor.numel() == 1 else tensor


def _concatenated(analysis: Analysis, node: fx.Node) -> None:
    given = ops.arguments(node)
    tensors, dim = given.get("tensors"), given.get("dim", 0)
    if not isinstance(tensors, tuple | list) or not all(analysis.is_tensor(tensor) for tensor in tensors):
        return
    axis = dim % analysis.values[node].ndim
    refused = list[str]()
    branches = [analysis.at(tensor, axis) for tensor in tensors]
    found = concatenations(branches, partial(_channels, analysis), refused) if axis in analysis.axes(node) else []
    _learn_join(analysis, node, found, refused, Cost(passes=1))


FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys(ops.VIEWS, view),
    **dict.fromkeys(ops.COPIES, _copy),
    **dict.fromkeys(ops.DROPOUTS, _dropout),
    **dict.fromkeys(ops.CONVOLUTIONS, _convolution),
    **dict.fromkeys(ops.ADDITIONS, _added),
    **dict.fromkeys(ops.SUBTRACTIONS, _subtracted),
    **dict.fromkeys(ops.PRODUCTS, _multiplied),
    **dict.fromkeys(ops.QUOTIENTS, _divided),
    **dict.fromkeys(ops.NEGATIONS, _negated),
    **dict.fromkeys(ops.CONCATENATIONS, _concatenated),
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.pad: _pad,
}
