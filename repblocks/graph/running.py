"""Run a flat graph node by node: for shapes on the meta device, for numbers on a model."""

import operator
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from repblocks.blocks.copying import on_meta
from repblocks.fusion.faithful import has_forward_hooks
from repblocks.graph.tracing import Trace

Values = dict[fx.Node, Any]
#: Functions that read the shape of a tensor, and leave its numbers alone.
SHAPE_READERS = {"size", "dim", "ndimension", "numel", "is_contiguous", "stride", "__len__", "type"}
SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad"}
SHAPE_TWINS = {"reshape_as", "view_as", "expand_as", "type_as"}


def execute(node: fx.Node, model: nn.Module, values: Mapping[fx.Node, Any]) -> Any:
    """The result of one node, from those of the nodes that it reads."""
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)  # pyright: ignore[reportArgumentType]
    return apply(node, model, args, kwargs)


def apply(node: fx.Node, model: nn.Module, args: Any, kwargs: Any) -> Any:
    """The result of one node on other arguments than its own."""
    target: Any = node.target
    match node.op:
        case "get_attr":
            return attribute(model, target)
        case "call_module":
            module = model.get_submodule(target)
            return torch.empty_like(args[0]) if _only_normalises(module, *args) else module(*args, **kwargs)
        case "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        case _ if target is F.batch_norm and args and args[0].is_meta:
            return torch.empty_like(args[0])
        case _:
            return target(*args, **kwargs)


def _only_normalises(module: nn.Module, *args: Any) -> bool:
    """Whether a BatchNorm of torch's runs for the shape of its result, which torch is slow to tell."""
    plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and not has_forward_hooks(module)
    return plain and len(args) == 1 and args[0].is_meta


def attribute(model: nn.Module, path: str) -> Any:
    """What ``path`` names, dots between the names."""
    return reduce(getattr, path.split("."), model)


def run(trace: Trace, model: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[fx.Node, Any]]:
    """Every node of a trace with its result on ``model``, in order; a result is dropped after its last use."""
    given = iter(tensors_in((args, kwargs)))
    last_use = {read: node for node in trace.nodes for read in node.all_input_nodes}
    values: Values = {}
    for node in trace.nodes:
        if node.op == "output":
            return
        values[node] = next(given) if node.op == "placeholder" else execute(node, model, values)
        yield node, values[node]
        for read in {node, *node.all_input_nodes}:
            if last_use.get(read, node) is node:
                values.pop(read, None)


def tensors_in(structure: Any) -> list[Tensor]:
    """The tensors among nested arguments, in order."""
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Tensor)]


def shapes(trace: Trace, model: nn.Module, args: Any, kwargs: Any) -> Values:
    """The results of all nodes on the meta device, tensors without numbers.

    Args:
        trace: Of the model.
        model: On the meta device.
        args: Tensors of any device.
        kwargs: Likewise.

    Raises:
        RuntimeError: An operation needs numbers, or does not take these shapes.
    """
    moved = pytree.tree_map_only(Tensor, on_meta, (args, kwargs))
    with torch.no_grad():
        try:
            return dict(run(trace, model, *moved))
        except RuntimeError:  # the code makes tensors of its own, which have to be on the meta device too
            with torch.device("meta"):
                return dict(run(trace, model, *moved))


def inputs_of(model: nn.Module, paths: list[str], args: Any, kwargs: Any) -> dict[str, tuple[Any, Any]]:
    """What the modules at ``paths`` are given the first time that the model runs them; left out if it never does."""
    found: dict[str, tuple[Any, Any]] = {}

    def remember(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: Any, named: Any) -> None:
            found.setdefault(path, pytree.tree_map_only(Tensor, torch.clone, (given, named)))

        return hook

    handles = [model.get_submodule(p).register_forward_pre_hook(remember(p), with_kwargs=True) for p in paths]
    try:
        with torch.no_grad():
            model.forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` asks for the shape or type of ``node``, not for its numbers."""
    if user.op == "call_method":
        twin = user.target in SHAPE_TWINS and node in user.args[1:] and user.args[0] is not node
        return user.target in SHAPE_READERS or twin
    is_attribute = user.op == "call_function" and user.target is getattr and user.args[1] in SHAPE_ATTRIBUTES
    return is_attribute or user.target is len


def mutated(node: fx.Node, model: nn.Module) -> list[fx.Node]:
    """The nodes whose tensors this one changes in place."""
    first = [argument for argument in node.args[:1] if isinstance(argument, fx.Node)]
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return node.all_input_nodes if any(getattr(m, "inplace", False) is True for m in module.modules()) else []
    if node.op == "call_method":
        name = str(node.target)
        return first if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else []
    if node.op != "call_function":
        return []
    out = node.kwargs.get("out")
    written = [out] if isinstance(out, fx.Node) else []
    in_place = node.target in _IN_PLACE or _named_in_place(node) or _takes_inplace(node)
    return written + (first if in_place else [])


_IN_PLACE = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
}


def _named_in_place(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def _takes_inplace(node: fx.Node) -> bool:
    """Whether a function is called with ``inplace=True``, by name or by position."""
    code = getattr(node.target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code else ()
    at = names.index("inplace") if "inplace" in names else len(node.args)
    return node.kwargs.get("inplace", node.args[at] if at < len(node.args) else False) is True
