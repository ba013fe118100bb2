"""New code for a module whose own has to change, written from the flat graph."""

import inspect
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from repblocks.blocks import RepBlock
from repblocks.graph.atoms import has_tensors
from repblocks.graph.edits import Edit, Edits
from repblocks.graph.running import attribute, mutated
from repblocks.graph.surgery import Dropped, inherit, module_at
from repblocks.graph.tracing import Call, nodes_in


class Unwritable(Exception):
    """A tensor that rewritten code would need does not exist any more: ``node`` has to stay."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(str(node))
        self.node = node


def written_calls(edits: Edits, model: nn.Module, layers: Mapping[Edit, nn.Module]) -> "list[Writer]":
    """What writes the new code of each call that needs some, innermost first.

    A call whose parts are written into the code around it gets none of its own.
    """
    writers = [Writer(edits, call, model, layers) for call in edits.dirty()]
    return [writer for writer in writers if not any(outer.takes_apart(writer.call) for outer in writers)]


def rewritten(writer: "Writer", model: nn.Module, *, keeps_methods: bool = False) -> nn.Module:
    """The module of a call with new code: a ``Sequential`` where that is all it is, else a ``GraphModule``.

    Args:
        writer: Of the call.
        model: The model that is being edited, inner calls done.
        keeps_methods: Whether other code calls methods of the module, so that its class must stay; that of the
            outermost one stays anyway, as far as its methods make sense.

    Raises:
        Unwritable: The code needs a tensor that an edit does away with.
    """
    call = writer.call
    old = module_at(model, call.path)
    graph = writer.write(model)
    keeps_methods = (keeps_methods or call.parent is None) and not isinstance(old, RepBlock)
    new = None if keeps_methods else _as_sequence(graph, writer.members)
    if new is None:
        new = _graph_module(old, keeps_methods)(writer.members, graph, type(old).__name__)
        _keep_containers(new, old, writer.members.keys() | writer.used_elsewhere())
    inherit(new, old)
    return new.eval()


class Rewritten(fx.GraphModule):
    """A graph module whose copies keep plain attributes and hooks."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rewritten":
        new: Rewritten = super().__deepcopy__(memo)  # pyright: ignore[reportAssignmentType]  # it copies the class
        inherit(new, self)
        return new


def _keep_containers(new: nn.Module, old: nn.Module, used: Set[str]) -> None:
    """Children of which only parts are called stay what they were, without what nobody calls or reads any more."""
    for name in {path.partition(".")[0] for path in used if "." in path}:
        container = old.get_submodule(name)
        _prune(container, name, used)
        setattr(new, name, container)


def _prune(module: nn.Module, path: str, used: Set[str]) -> None:
    """Let go of tensors that nothing uses; the names stay where a class may ask for them."""
    if path in used:
        return
    for name, child in list(module.named_children()):
        if any(f"{user}.".startswith(f"{path}.{name}.") for user in used):
            _prune(child, f"{path}.{name}", used)
        elif isinstance(child, Dropped) or has_tensors(child):
            _let_go(module, name)
    for tensors in (module._parameters, module._buffers):  # pyright: ignore[reportPrivateUsage]  # to be emptied
        tensors |= {name: None for name in tensors if f"{path}.{name}" not in used}


def _let_go(module: nn.Module, name: str) -> None:
    if type(module) in (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict):
        delattr(module, name)
    else:
        setattr(module, name, nn.Identity())


class _NoArguments(nn.Module):
    """Between a ``GraphModule`` and the class whose methods it keeps: that class is not initialised again."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def _graph_module(old: nn.Module, keeps_methods: bool) -> type[fx.GraphModule]:  # noqa: FBT001
    if not keeps_methods or isinstance(old, fx.GraphModule):
        return Rewritten
    return type(type(old).__name__, (Rewritten, _NoArguments, type(old)), {})


def _as_sequence(graph: fx.Graph, members: Mapping[str, Any]) -> nn.Sequential | None:
    """Modules in a row, if a graph is nothing else."""
    links = list(graph.nodes)
    calls = links[1:-1]
    if links[0].op != "placeholder" or links[-1].args != (links[-2],) or not calls:
        return None
    chained = all(
        link.op == "call_module" and link.args == (before,) and not link.kwargs
        for before, link in zip(links, calls, strict=False)
    )
    names = [str(link.target).replace(".", "_") for link in calls]
    if not chained or len(set(names)) < len(names):
        return None
    return nn.Sequential(OrderedDict((n, members[str(link.target)]) for n, link in zip(names, calls, strict=True)))


class Writer:
    """Writes the graph of one call, from the flat graph of the model."""

    def __init__(self, edits: Edits, call: Call, model: nn.Module, layers: Mapping[Edit, nn.Module]) -> None:
        self.trace, self.call, self.model, self.layers = edits.analysis.trace, call, model, layers
        self.edits = edits
        self.graph = fx.Graph()
        self.members = dict[str, Any]()
        self.known = dict[fx.Node, fx.Node]()
        self.place = self.trace.place
        inside = set(self.trace.nodes[call.start : call.stop])
        self.splices = {edit.node: edit for edit in edits.edits if edit.owner and edit.node in inside}
        self.elided = {node for edit in edits.edits for node in edit.elided if node in inside}
        self.idle = {path for edit in edits.edits for path in edit.idle}
        self.children = {child.start: child for child in reversed(self.trace.calls) if self._is_part(child)}
        self.first = defaultdict[int, list[Edit]](list)
        for edit in self.splices.values():
            self.first[min(self.place[node] for node in edit.dead)].append(edit)

    def _is_part(self, child: Call) -> bool:
        """Whether a call further in is written as a call: no edit reaches into it from outside."""
        if child is self.call or self.call not in child.around() or child.start == child.stop:
            return False
        span = range(child.start, child.stop)
        reaching = [edit for edit in self.splices.values() if edit.owner and child not in edit.owner.around()]
        return not any(self.place[node] in span for edit in reaching for node in edit.dead) and not self._leaks(child)

    def _leaks(self, child: Call) -> bool:
        """Whether tensors leave a call by other ways than its result."""
        given = set(nodes_in(child.result))
        span = self.trace.nodes[child.start : child.stop]
        inside = set(span)
        return any(user not in inside for node in span if node not in given for user in node.users)

    def takes_apart(self, call: Call) -> bool:
        """Whether a call further in is not written as one, nor is part of one."""
        inside = call is not self.call and self.call in call.around()
        return inside and not any(child in call.around() for child in self.children.values())

    def write(self, model: nn.Module) -> fx.Graph:
        """The graph, over the modules of ``model``."""
        self.model = model
        self.needed = self._needed()
        self._place_inputs()
        self._write_range(self.call.start, self.call.stop)
        self.graph.output(map_arg(self.call.result, self._now))
        return self.graph

    def used_elsewhere(self) -> set[str]:
        """What code outside of the call reaches of its module, by name in that module."""
        outside = [*self.trace.nodes[: self.call.start], *self.trace.nodes[self.call.stop :]]
        prefix = f"{self.call.path}." if self.call.path else ""
        paths = {str(node.target) for node in outside if node.op in ("call_module", "get_attr")}
        return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}

    def _needed(self) -> set[fx.Node]:
        """What the result depends on, and what changes tensors in place."""
        dead = {node for edit in self.splices.values() for node in edit.dead}
        needed = set(nodes_in(self.call.result))
        for place in range(self.call.stop - 1, self.call.start - 1, -1):
            node = self.trace.nodes[place]
            if node in needed or (node not in dead and mutated(node, self.edits.analysis.shadow)):
                needed |= {node, *self._reads(node), *self._reads_around(place)}
        return needed

    def _reads(self, node: fx.Node) -> Iterable[fx.Node]:
        if node in self.splices:
            form = self.splices[node].form
            extra = [read for view in form.views for read in view.all_input_nodes[1:]]
            return [form.anchor.node, *extra]
        return [self._passed_on(node)] if self._passes_on(node) else node.all_input_nodes

    def _passed_on(self, node: fx.Node) -> fx.Node:
        return self.edits.analysis.inputs(node)[0]

    def _passes_on(self, node: fx.Node) -> bool:
        return node in self.elided or (node.op == "call_module" and node.target in self.idle)

    def _reads_around(self, place: int) -> Iterable[fx.Node]:
        """The arguments of the calls that a node is part of: they are written whole."""
        for child in self.children.values():
            if child.start <= place < child.stop:
                yield from nodes_in((child.args, child.kwargs))

    def _place_inputs(self) -> None:
        names = _parameter_names(self.call)
        for name, value in zip([*names, *self.call.kwargs], [*self.call.args, *self.call.kwargs.values()], strict=True):
            self._bind(value, self.graph.placeholder(name))

    def _bind(self, structure: Any, node: fx.Node) -> None:
        """Every node of a nested argument or result is an entry of ``node``."""
        if isinstance(structure, fx.Node):
            self.known[structure] = node
        elif isinstance(structure, tuple | list | dict):
            for key, part in structure.items() if isinstance(structure, dict) else enumerate(structure):
                if any(True for _ in nodes_in(part)):
                    self._bind(part, self.graph.call_function(operator.getitem, (node, key)))

    def _write_range(self, start: int, stop: int) -> None:
        place = start
        while place < stop:
            child = self.children.get(place)
            if child is not None and child.stop <= stop:
                if self.needed & set(self.trace.nodes[child.start : child.stop]):
                    self._write_call(child)
                place = child.stop
            else:
                self._write_place(place)
                place += 1

    def _write_place(self, place: int) -> None:
        for edit in self.first.get(place, []):
            self._splice(edit)
        node = self.trace.nodes[place]
        if node in self.needed and node not in self.known:
            self._write_node(node)

    def _write_call(self, child: Call) -> None:
        args, kwargs = map_arg((child.args, child.kwargs), self._now)
        self._bind(child.result, self._module(self.trace.nodes[child.start], child.path, args, kwargs))

    def _write_node(self, node: fx.Node) -> None:
        if self._passes_on(node):
            self.known[node] = self._now(self._passed_on(node))
        elif node.op == "call_module":
            args, kwargs = map_arg((node.args, node.kwargs), self._now)
            self.known[node] = self._module(node, str(node.target), args, kwargs)
        elif node.op == "get_attr":
            target = self._member(str(node.target), attribute(self.model, str(node.target)))
            self.known[node] = self.graph.get_attr(target)
        else:
            self.known[node] = self.graph.node_copy(node, self._now)

    def _module(self, node: fx.Node, path: str, args: Any, kwargs: Any) -> fx.Node:
        module = self.model.get_submodule(path)
        if isinstance(module, Dropped):
            raise Unwritable(node)
        return self.graph.call_module(self._member(path, module), args, kwargs)

    def _member(self, path: str, member: Any) -> str:
        """The name of something in the model, seen from the module that is written."""
        prefix = f"{self.call.path}." if self.call.path else ""
        name = path.removeprefix(prefix) if path.startswith(prefix) else path.replace(".", "_")
        self.members[name] = member
        return name

    def _splice(self, edit: Edit) -> None:
        form = edit.form
        base = self._now(form.anchor.node)
        width = self.edits.analysis.values[form.anchor.node].shape[form.axis] if not form.views else None
        if width is not None and form.anchor.stop - form.anchor.start != width:
            count = form.anchor.stop - form.anchor.start
            base = self.graph.call_function(torch.narrow, (base, form.axis, form.anchor.start, count))
        name = _free_name(_kind(self.layers[edit]), self.members, module_at(self.model, self.call.path))
        self.members[name] = self.layers[edit]
        if form.leads:
            base = self._viewed(edit, self.graph.call_module(name, (base,)))
        else:
            base = self.graph.call_module(name, (self._viewed(edit, base),))
        self.known[edit.node] = base

    def _viewed(self, edit: Edit, base: fx.Node) -> fx.Node:
        for view in edit.form.views:
            base = self._view_again(view, base)
        return base

    def _view_again(self, view: fx.Node, base: fx.Node) -> fx.Node:
        read = view.all_input_nodes[0]
        if view.op == "call_module":
            return self._module(view, str(view.target), (base,), {})
        return self.graph.node_copy(view, lambda node: base if node is read else self._now(node))

    def _now(self, node: fx.Node) -> fx.Node:
        if node not in self.known:
            raise Unwritable(node)
        return self.known[node]


def _kind(layer: nn.Module) -> str:
    return "linear" if isinstance(layer, nn.Linear) else "conv" if hasattr(layer, "kernel_size") else "scale"


def _free_name(wanted: str, members: Mapping[str, Any], module: nn.Module) -> str:
    taken = {name.partition(".")[0] for name in members} | set(dir(module))
    names = (wanted if count == 0 else f"{wanted}_{count}" for count in range(len(taken) + 1))
    return next(name for name in names if name not in taken)


def _parameter_names(call: Call) -> list[str]:
    """Names of the positional arguments of a call."""
    parameters = list(inspect.signature(call.module.forward).parameters.values())
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [plain[at] if at < len(plain) else f"input_{at}" for at in range(len(call.args))]
