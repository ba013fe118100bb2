"""The abstract interpretation: every tensor as convolutions of earlier ones, as far as that is exact."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from repblocks.blocks.copying import in_float64
from repblocks.errors import FoldError
from repblocks.graph.forms import Anchor, Cost, Form, is_last, price
from repblocks.graph.lazy import Lazy, unit
from repblocks.graph.running import Values, attribute, execute, reads_shape_only
from repblocks.graph.tracing import Trace

#: Forms kept per tensor: those over the nearest anchors, and the one over the farthest.
MOST_FORMS = 16


@dataclass(eq=False, slots=True)
class Analysis:
    """What is linear in a traced model.

    Attributes:
        trace: The graph.
        model: Its weights; only read.
        shadow: The same model on the meta device, in eval mode.
        values: Result of every node on the meta device.
        barred: Nodes that must stay as they are, with reasons.
        tainted: Tensors that are changed in place while others read them, so that nothing may be calculated from them
            at another moment.
        forms: Of every linear node, beside the trivial one.
        costs: Of linear nodes as they are; 0 of what only moves or picks.
        refusals: Why a node that may be linear is not merged with what is before it.
        constants: Nodes that do not depend on the input.
    """

    trace: Trace
    model: nn.Module
    shadow: nn.Module
    values: Values
    barred: Mapping[fx.Node, str]
    tainted: Set[fx.Node]
    forms: dict[fx.Node, list[Form]] = field(default_factory=dict[fx.Node, list[Form]])
    costs: dict[fx.Node, Cost] = field(default_factory=dict[fx.Node, Cost])
    refusals: dict[fx.Node, str] = field(default_factory=dict[fx.Node, str])
    constants: set[fx.Node] = field(default_factory=set[fx.Node])
    _numbers: dict[fx.Node, Any] = field(default_factory=dict[fx.Node, Any])
    _prices: dict[int, Cost | None] = field(default_factory=dict[int, "Cost | None"])
    _replaced: dict[int, int] = field(default_factory=dict[int, int])

    def is_tensor(self, node: Any) -> TypeGuard[fx.Node]:
        """Whether a node is a tensor of real numbers that depends on the input."""
        value = self.values.get(node) if isinstance(node, fx.Node) and node not in self.constants else None
        return isinstance(value, Tensor) and value.is_floating_point()

    def at(self, node: Any, axis: int) -> list[Form]:
        """The forms of a tensor with channels at ``axis``, the trivial one first; none where it must not be touched."""
        if not self.is_tensor(node) or node in self.tainted:
            return []
        size = self.values[node].shape
        if len(size) <= axis or not size.numel():
            return []
        own = Form(anchor=Anchor(node, 0, size[axis]), value=unit(size[axis]), axis=axis, out_axis=axis)
        return [own, *(form for form in self.forms.get(node, []) if form.out_axis == axis)]

    def axes(self, node: fx.Node) -> Sequence[int]:
        """Where the channels of a tensor may be: second, as for convolutions, or last, as for linear layers."""
        last = self.values[node].ndim - 1
        return (1, last) if last > 1 else (1,) if last == 1 else ()

    def learn(self, node: fx.Node, forms: Sequence[Form], cost: Cost) -> None:
        """Remember that a node is linear."""
        self.forms[node] = list(forms[: MOST_FORMS - 1]) + list(forms[MOST_FORMS - 1 :][-1:])
        self.costs[node] = cost

    def chain(self, node: fx.Node, read: Any, atom: Lazy, axis: int, *, weights: int = 0, counts: bool = False) -> None:
        """Learn ``node == atom(read)``, and why that does not merge with what is before it.

        Args:
            node: The result.
            read: The argument.
            atom: The value.
            axis: Where it reads the channels.
            weights: Of the operation as it stands, biases apart.
            counts: Whether the operation, as it stands, multiplies.
        """
        found = list[Form]()
        for form in self.at(read, axis):
            try:
                found.append(form.then(atom))
            except FoldError as error:
                if not form.views:  # behind views it merges from the other side, or has nothing to merge with
                    self.refusals.setdefault(node, str(error))
        if found:
            size = self.values[read].shape
            macs = 0 if not counts else size.numel() if atom.is_diagonal else price(atom, size, axis).macs
            self.learn(node, [*self.forms.get(node, []), *found], Cost(macs, weights, 1))

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that a linear node reads, behind the tuples of chunk and split."""
        found = list[fx.Node]()
        for read in node.all_input_nodes:
            while isinstance(self.values.get(read), tuple | list) and read.all_input_nodes:
                read = read.all_input_nodes[0]
            if self.is_tensor(read) and not reads_shape_only(node, read):
                found.append(read)
        return found

    def between(self, anchor: fx.Node, node: fx.Node) -> list[fx.Node]:
        """The tensors on the ways from ``anchor`` to ``node``, in order, the latter included."""
        found, waiting = {node}, [node]
        while waiting:
            for read in self.inputs(waiting.pop()):
                if read is not anchor and read not in found and read in self.forms:
                    found.add(read)
                    waiting.append(read)
        return sorted(found, key=self.trace.place.__getitem__)

    def replaced_weights(self, node: fx.Node, form: Form) -> int:
        """The weights of all that a form of ``node`` does away with."""
        if id(form) not in self._replaced:
            dead = self.between(form.anchor.node, node)
            self._replaced[id(form)] = sum(self.costs[gone].weights for gone in dead)
        return self._replaced[id(form)]

    def price(self, form: Form) -> Cost | None:
        """What a form costs without its anchor; None if no layer of torch computes it."""
        if id(form) not in self._prices:
            self._prices[id(form)] = self._price(form)
        return self._prices[id(form)]

    def _price(self, form: Form) -> Cost | None:
        size, shape = self.place_size(form), form.value.shape
        dense = not form.value.is_diagonal and not shape.rank
        if dense and not is_last(size, form.axis) and (form.axis != 1 or len(size) > 5):
            return None
        own = price(form.value, size, form.axis)
        return own._replace(passes=own.passes + sum(self.costs[view].passes for view in form.views))

    def place_size(self, form: Form) -> torch.Size:
        """Shape of the tensor that the value of a form is applied on."""
        at = form.views[-1] if form.views and not form.leads else form.anchor.node
        size = list(self.values[at].shape)
        size[form.axis] = form.value.shape.in_channels
        return torch.Size(size)

    def meta(self, node: Any) -> Any:
        """A constant argument without numbers, in float64."""
        return in_float64(self.values[node]) if isinstance(node, fx.Node) else node

    def number(self, node: Any) -> Any:
        """A constant argument in float64 on the CPU."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self._numbers:
            if node.op == "get_attr":
                self._numbers[node] = in_float64(attribute(self.model, str(node.target)).detach())
            else:
                self._numbers[node] = execute(
                    node, self.model, {read: self.number(read) for read in node.all_input_nodes}
                )
        return self._numbers[node]

    def lazily(self, build: Callable[..., Any], *constants: Any) -> Lazy:
        """A value built from constant arguments."""
        return Lazy(build(*map(self.meta, constants)).to("meta"), lambda: build(*map(self.number, constants)))
