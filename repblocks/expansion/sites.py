"""Where a model can be expanded: its plain convolutions, each with the BatchNorm that the data flows into."""

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from repblocks.blocks import RepBlock
from repblocks.expansion.expanded import Norm, is_norm, on_meta
from repblocks.fusion.faithful import has_forward_hooks, is_faithful
from repblocks.graph.tracing import Trace, is_layer, trace

_UNCALLED = "no traced code calls it"


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Site:
    """A convolution that may become a block.

    Attributes:
        name: Of the convolution in the model.
        conv: The convolution.
        norm_name, norm: The BatchNorm that alone reads its output, if there is one.
    """

    name: str
    conv: nn.Conv2d
    norm_name: str | None = None
    norm: Norm | None = None


def find_sites(model: nn.Module) -> dict[str, Site | str]:
    """Every convolution of a model by name: its site, or the reason in words why it has to stay.

    The data flow is read from a copy on the meta device, in eval and in train mode; code that cannot be traced is
    entered module by module. Convolutions over other than two spatial dims are listed, those inside blocks are not.
    """
    twin = on_meta(model)
    flow = _Flow(twin)
    for mode in (False, True):
        flow.follow(twin.train(mode), ())
    return {name: flow.judge(name, conv, model) for name, conv in convolutions(model)}


def convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every convolution outside of blocks, by name."""
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, RepBlock) and name]
    if isinstance(model, RepBlock):
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not name.startswith(tuple(blocks)):
            yield name, module


@dataclass(frozen=True, eq=False, slots=True)
class _Use:
    """One call of a layer: what it reads, if that is the output of one layer, and the one layer that reads it."""

    reads: nn.Module | None
    read_by: nn.Module | None


class _Flow:
    """What is known of the layers' calls, from all traces."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.names = {id(module): name for name, module in root.named_modules()}
        self.uses: defaultdict[int, list[_Use]] = defaultdict(list)
        self.repeated: dict[int, int] = {}
        self.taken: set[int] = set()  # parameters that code reads past their layer
        self.opaque: dict[str, str] = {}
        self.followed: set[tuple[int, str]] = set()
        self.owners = Counter(id(p) for module in root.modules() for p in module._parameters.values())  # pyright: ignore[reportPrivateUsage]
        self.held = _held_outside(root)

    def follow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Trace a module, and those inside that stayed whole, each as it is called."""
        if (key := (id(module), repr((args, kwargs, module.training)))) in self.followed:
            return
        self.followed.add(key)
        if _is_leaf(module):
            self.repeated[id(module)] = 1
            self.uses[id(module)].append(_Use(None, None))
            return
        traced = trace(module, args, kwargs, leaf=_is_leaf)
        if "" in traced.sealed:
            self._enter(module, traced.sealed[""])
            return
        self._record(traced)
        for node in traced.nodes:
            if node.op == "call_module" and node.target in traced.sealed:
                self.follow(traced.root.get_submodule(str(node.target)), *_as_called(node))

    def _enter(self, module: nn.Module, reason: str) -> None:
        """Look into code that cannot be traced; how it calls its children is guessed where there is no choice."""
        self.opaque[self.names[id(module)]] = reason
        for child in module.children():
            if type(child).forward is nn.Module.forward:  # a list of modules, which the same code calls
                self._enter(child, reason)
            elif _takes_tensors_only(child) and not _is_leaf(child):
                self.follow(child, ())
            elif not _is_leaf(child):
                self.opaque[self.names[id(child)]] = "is called, with options, by code that cannot be traced"

    def _record(self, traced: Trace) -> None:
        layers = {node: traced.root.get_submodule(str(node.target)) for node in traced.nodes if _is_call(node)}
        for layer, count in Counter(layers.values()).items():
            self.repeated[id(layer)] = max(count, self.repeated.get(id(layer), 0))
        for node, layer in layers.items():
            source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            reads = layers.get(source) if isinstance(source, fx.Node) else None
            readers = list(node.users)
            self.uses[id(layer)].append(_Use(reads, layers.get(readers[0]) if len(readers) == 1 else None))
        tensors = dict(traced.root.named_parameters(remove_duplicate=False))
        self.taken |= {id(tensors.get(str(node.target))) for node in traced.nodes if node.op == "get_attr"}

    def judge(self, name: str, conv: nn.Module, model: nn.Module) -> Site | str:
        """The site of a convolution of the model, or why it is none."""
        twin = self.root.get_submodule(name)
        if not isinstance(conv, nn.Conv2d):
            return f"is a {type(conv).__name__}; blocks are two-dimensional"
        if reason := self._why_not(name, twin, kind=nn.Conv2d):
            return reason
        norm = self._norm_behind(twin)
        if norm is None:
            return Site(name=name, conv=conv)
        norm_name = self.names[id(norm)]
        if reason := self._why_not(norm_name, norm) or _untracked(norm):
            return f"its BatchNorm {norm_name!r} {reason}"
        found = model.get_submodule(norm_name)
        assert isinstance(found, Norm)
        return Site(name=name, conv=conv, norm_name=norm_name, norm=found)

    def _norm_behind(self, conv: nn.Module) -> nn.Module | None:
        readers = {use.read_by for use in self.uses[id(conv)]}
        (reader,) = readers if len(readers) == 1 else (None,)
        reads = {use.reads for use in self.uses[id(reader)]} if reader is not None else set()
        return reader if reader is not None and is_norm(reader) and reads == {conv} else None

    def _why_not(self, name: str, layer: nn.Module, kind: type[nn.Module] | None = None) -> str | None:
        parameters = {id(parameter) for parameter in layer.parameters()}
        if parametrize.is_parametrized(layer):
            return "is parametrized: its weight is computed in every forward pass"
        if has_forward_hooks(layer) or any(entries for key, entries in vars(layer).items() if _holds_hooks(key)):
            return "carries hooks, which a block would lose"
        if kind is not None and not is_faithful(layer, kind):
            return f"is a {type(layer).__name__}, which computes something else than {kind.__name__}"
        if parameters & self.taken or any(self.owners[key] > 1 for key in parameters):
            return "shares its weight with other code"
        if id(layer) in self.held:
            return "is also held outside of the tree of modules, where it would not be replaced"
        count = self.repeated.get(id(layer), 0)
        return None if count == 1 else f"is called {count} times" if count else self._why_uncalled(name)

    def _why_uncalled(self, name: str) -> str:
        around = [path for path in self.opaque if not path or name == path or name.startswith(f"{path}.")]
        if not around:
            return _UNCALLED
        innermost = max(around, key=len)
        return f"{_UNCALLED}; {innermost or type(self.root).__name__} {self.opaque[innermost]}"


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, RepBlock) or is_norm(module) or is_layer(module)


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_module"


def _as_called(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node, with a tensor for each that the graph computes, positional as far as they can be."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda _: torch.empty(0))
    return args, kwargs


def _takes_tensors_only(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return all(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _untracked(norm: nn.Module) -> str | None:
    tracked = getattr(norm, "running_mean", None) is not None and getattr(norm, "running_var", None) is not None
    return None if tracked else "has no running statistics, so that no convolution equals it"


def _holds_hooks(attribute: str) -> bool:
    return attribute.startswith("_") and attribute.endswith("_hooks")


def _held_outside(root: nn.Module) -> set[int]:
    """Modules that an attribute refers to which is no child: in a plain list, say."""
    values = [value for m in root.modules() for key, value in vars(m).items() if key != "_modules"]
    return {id(module) for value in values for module in _modules_in(value)}


def _modules_in(value: Any) -> Iterable[nn.Module]:
    leaves = pytree.tree_leaves(value) if isinstance(value, list | tuple | dict) else [value]
    return (leaf for leaf in leaves if isinstance(leaf, nn.Module) and not isinstance(leaf, Tensor))
