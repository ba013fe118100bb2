"""One flat graph of what a model calls, by symbolic tracing, with a record of which module every node belongs to."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import get_notrace_functions  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.fx.proxy import Proxy
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from repblocks.blocks import RepConv
from repblocks.fusion import fold
from repblocks.fusion.containers import Branches
from repblocks.fusion.faithful import has_forward_hooks

Leaf = Callable[[nn.Module], bool]


@dataclass(eq=False, slots=True)
class Call:
    """One call of a module that was traced through.

    Attributes:
        path: Name of the module in the model; ``""`` is the model.
        module: The module.
        parent: The call around it.
        args, kwargs, result: Nodes in place of tensors.
        start, stop: Its nodes, as a range of `Trace.nodes`.
    """

    path: str
    module: nn.Module
    parent: "Call | None"
    args: Any
    kwargs: Any
    start: int
    stop: int = -1
    result: Any = None

    def around(self) -> "list[Call]":
        """This call and those around it, innermost first."""
        return [self, *(self.parent.around() if self.parent else [])]


@dataclass(eq=False, slots=True)
class Trace:
    """A flat graph: ``call_module`` nodes for layers and sealed modules, their targets paths in the model.

    Attributes:
        graph: The graph.
        root: The traced model.
        nodes: Of the graph, in order.
        place: Of every node in that order.
        calls: Every call of a module that was traced through, in order of entry.
        stateful: Paths of modules whose code changes their attributes.
        sealed: Path to reason of the modules that were not traced through; ``""`` if that is the model itself.
        owners: The innermost call around each node; None for the inputs and the output.
    """

    graph: fx.Graph
    root: nn.Module
    nodes: list[fx.Node] = field(default_factory=list[fx.Node])
    place: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])
    calls: list[Call] = field(default_factory=list[Call])
    sealed: dict[str, str] = field(default_factory=dict[str, str])
    stateful: set[str] = field(default_factory=set[str])
    owners: dict[fx.Node, Call | None] = field(default_factory=dict[fx.Node, Call | None])

    def handed_on(self) -> set[fx.Node]:
        """Tensors that a call is given and does not use, or returns and nobody outside uses; it wants them anyway."""
        place, found = self.place, set[fx.Node]()
        for call in self.calls[1:]:
            span, result = range(call.start, call.stop), nodes_in(call.result)
            given = nodes_in((call.args, call.kwargs)) if span else []
            found |= {n for n in given if not any(place[user] in span for user in n.users)}
            found |= {n for n in result if place[n] in span and all(place[user] in span for user in n.users)}
        return found

    def repeated(self) -> dict[str, int]:
        """How often the modules are called that were traced through more than once, outermost ones only."""
        counts = Counter(call.path for call in self.calls)
        inside = {call.path for call in self.calls if any(counts[outer.path] > 1 for outer in call.around()[1:])}
        return {path: count for path, count in counts.items() if count > 1 and path not in inside}


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one node of the graph: torch's own layers, and those with a rule of `fold`.

    Containers are looked into, and so are subclasses that compute something else than their base.
    """
    cls = type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)
    if isinstance(module, nn.Sequential | Branches | RepConv):
        return False
    return cls.__module__.startswith(("torch.nn.", "torch.ao.nn.")) or fold.applies_to(module)


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sealed: Mapping[str, str] | None = None,
    leaf: Leaf = is_layer,
) -> Trace:
    """Trace symbolically what ``model.forward(*args, **kwargs)`` calls; no number is computed.

    A module that carries forward hooks, is called more than once, or whose code cannot be traced stays one node, and
    `Trace.sealed` says why.

    Args:
        model: Its own hooks are not traced. Its code runs, with proxies: what it remembers of its inputs it will
            remember of those.
        args: Tensors stand for any tensors, other values for themselves. Without any, every required parameter of
            ``forward`` is a tensor.
        kwargs: Likewise.
        sealed: Further modules to leave whole, with reasons.
        leaf: Which modules are single nodes.
    """
    given = (args or _required_tensors(model), dict(kwargs or {}))
    reasons = dict(sealed or {})
    traced = _Tracer(given, reasons, leaf).run(model)
    if repeated := traced.repeated():
        reasons |= {path: f"is called {count} times" for path, count in repeated.items()}
        traced = _Tracer(given, reasons, leaf).run(model)
    return traced


def _required_tensors(model: nn.Module) -> tuple[Tensor, ...]:
    code = getattr(model.forward, "__wrapped__", model.forward).__code__
    optional = len(getattr(model.forward, "__defaults__", None) or ())
    return (torch.empty(0),) * max(code.co_argcount - 1 - optional, 1)


class _TensorProxy(Proxy):
    """A parameter or buffer, whose shape and dtype are known."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.shape, self.ndim, self.dtype = tensor.shape, tensor.ndim, tensor.dtype

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()


class _Tracer(fx.Tracer):
    """Torch's tracer, with a record of the calls; what fails inside a module makes that module one node."""

    def __init__(self, given: tuple[Any, dict[str, Any]], reasons: Mapping[str, str], leaf: Leaf) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)
        self.given, self.reasons, self.leaf = given, reasons, leaf
        self.inside: Call | None = None

    def run(self, model: nn.Module) -> Trace:
        self.found = Trace(fx.Graph(), model)
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.tensors = {id(tensor): path for path, tensor in reversed(named)}
        self.found.graph = self.trace(model)
        self.found.place = {node: at for at, node in enumerate(self.found.nodes)}
        return self.found

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:  # noqa: FBT001
        def enter() -> Any:
            args, kwargs = pytree.tree_map_only(Tensor, self._placeholder, self.given)
            return self.call_module(self.root, self.root.forward, args, kwargs)

        return enter, []

    def _placeholder(self, _: Tensor) -> Proxy:
        return self.create_proxy("placeholder", f"input_{len(self.found.nodes)}", (), {})

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.found.nodes.append(node)
        self.found.owners[node] = self.inside
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        path = self.tensors.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if path is None:
            return attr_val
        return self.create_proxy(
            "get_attr", path, (), {}, proxy_factory_fn=lambda node: _TensorProxy(node, self, attr_val)
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if m is self.root:
            return self._through(path, m, m.forward, args, kwargs)
        reason = self.reasons.get(path) or ("carries forward hooks" if has_forward_hooks(m) else None)
        if reason and not (self.leaf(m) and path not in self.reasons):
            self.found.sealed[path] = reason
        if reason or self.leaf(m):
            return self.create_proxy("call_module", path, args, kwargs)
        return self._through(path, m, forward, args, kwargs)

    def _through(self, path: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        nodes, calls, sealed = len(self.found.nodes), len(self.found.calls), dict(self.found.sealed)
        call = Call(path, module, self.inside, _nodes(args), _nodes(kwargs), nodes)
        self.found.calls.append(call)
        self.inside = call
        before = dict(vars(module))
        try:
            result = forward(*args, **kwargs)
            self._note_changes(path, before, vars(module))
            call.result, call.stop = _nodes(result), len(self.found.nodes)
        except Exception as error:  # whatever a user's code does with a symbolic input
            self._forget(nodes, calls)
            self.found.sealed = {**sealed, path: f"cannot be traced ({_first_line(error)})"}
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self.inside = call.parent
        return result

    def _note_changes(self, path: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        if before.keys() != after.keys() or any(after[name] is not value for name, value in before.items()):
            self.found.stateful.add(path)

    def _forget(self, nodes: int, calls: int) -> None:
        for node in reversed(self.found.nodes[nodes:]):
            self.graph.erase_node(node)
        del self.found.nodes[nodes:], self.found.calls[calls:]


def _nodes(value: Any) -> Any:
    found: Callable[[Any], Any] = lambda item: item.node if isinstance(item, Proxy) else item  # noqa: E731
    return map_aggregate(value, found)


def nodes_in(structure: Any) -> list[fx.Node]:
    """The nodes among nested values."""
    found = list[fx.Node]()
    map_arg(structure, lambda node: found.append(node) or node)
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
