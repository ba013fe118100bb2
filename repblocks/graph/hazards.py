"""What must not be touched: shared weights, hooks, mixed dtypes, tensors that are changed in place."""

from collections import Counter, defaultdict
from collections.abc import Callable

from torch import Tensor, fx, nn

from repblocks.fusion.faithful import has_forward_hooks
from repblocks.graph.operators import WEIGHTED_FUNCTIONS, arguments
from repblocks.graph.running import Values, attribute, mutated, reads_shape_only
from repblocks.graph.tracing import Trace

Allowed = Callable[[str], bool]


def owner_path(trace: Trace, node: fx.Node) -> str:
    """The layer that a node calls, or the module whose code it belongs to."""
    if node.op == "call_module":
        return str(node.target)
    owner = trace.owners[node]
    return owner.path if owner else ""


def barred(trace: Trace, model: nn.Module, values: Values, allowed: Allowed) -> dict[fx.Node, str]:
    """The nodes that stay as they are, with the reasons; ``""`` outside of what was asked for."""
    found = {node: reason for node in trace.nodes if (reason := _bar(trace, model, values, node))}
    found |= _shared(trace, model)
    return found | {node: "" for node in trace.nodes if not allowed(owner_path(trace, node))}


def _bar(trace: Trace, model: nn.Module, values: Values, node: fx.Node) -> str | None:
    if node.op != "call_module" or node.target in trace.sealed:
        return None
    layer, result = model.get_submodule(str(node.target)), values[node]
    if has_forward_hooks(layer):
        return "carries forward hooks"
    dtypes = {tensor.dtype for tensor in layer.parameters() if tensor.is_floating_point()}
    if dtypes and isinstance(result, Tensor) and dtypes != {result.dtype}:
        return f"computes in {result.dtype} with weights of {', '.join(map(str, dtypes))}"
    return None


def _shared(trace: Trace, model: nn.Module) -> dict[fx.Node, str]:
    """Calls of layers that are called again, or whose weights others use."""
    calls = Counter(node.target for node in trace.nodes if node.op == "call_module")
    homes = _homes(trace, model)
    found = dict[fx.Node, str]()
    for node in trace.nodes:
        own = owner_path(trace, node) if node.op == "call_module" else str(node)
        others = {other for tensor in _weights(node, model) for other in homes[id(tensor)] - {own}}
        if node.op == "call_module" and calls[node.target] > 1:
            found[node] = f"is called {calls[node.target]} times"
        elif others:
            found[node] = f"shares its weight with {', '.join(sorted(others))}"
    return found


def _homes(trace: Trace, model: nn.Module) -> dict[int, set[str]]:
    """By weight: the layers that are registered with it, and the functions that read it as a weight."""
    homes = defaultdict[int, set[str]](set)
    called = {str(node.target) for node in trace.nodes if node.op == "call_module"}
    for path, module in model.named_modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            homes[id(tensor)] |= {path} if path in called else set()
    for node in trace.nodes:
        for tensor in _weights(node, model) if node.op != "call_module" else ():
            homes[id(tensor)].add(str(node))
        if node.op == "get_attr" and str(node.target).rpartition(".")[0] in called and _is_read(node):
            homes[id(attribute(model, str(node.target)))].add(f"the code of {owner_path(trace, node) or 'the model'}")
    return homes


def _is_read(node: fx.Node) -> bool:
    return not all(reads_shape_only(user, node) for user in node.users)


def _weights(node: fx.Node, model: nn.Module) -> list[Tensor]:
    """The parameters of a layer, or the kernel that a function is given."""
    if node.op == "call_module":
        layer = model.get_submodule(str(node.target))
        return [*layer.parameters(), *layer.buffers()]
    if node.target in WEIGHTED_FUNCTIONS:
        weight = arguments(node).get("weight")
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            return [attribute(model, str(weight.target))]
    return []


def tainted(trace: Trace, model: nn.Module, values: Values) -> set[fx.Node]:
    """Tensors that some operation changes in place while others read them, before or after."""
    groups = defaultdict[int, list[fx.Node]](list)
    for node, value in values.items():
        if isinstance(value, Tensor):
            groups[_storage(value)].append(node)
    writers = [(node, read) for node in trace.nodes for read in mutated(node, model)]
    found = set[fx.Node]()
    for writer, written in writers:
        if not isinstance(values.get(written), Tensor):
            continue
        group = groups[_storage(values[written])]
        earlier = [node for node in group if trace.place[node] < trace.place[writer]]
        if any(_reads_beside(user, node, writer, earlier) for node in earlier for user in node.users):
            found |= set(earlier)
    return found


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]  # no address on the meta device


def _reads_beside(user: fx.Node, node: fx.Node, writer: fx.Node, earlier: list[fx.Node]) -> bool:
    """Whether a reader of a tensor is neither the writer, nor hands the same tensor on before that writes."""
    return user is not writer and user not in earlier and not reads_shape_only(user, node)
