"""Convolutions that only positively homogeneous activations separate: what is scaled in one is unscaled in the next."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from repblocks.fusion.faithful import has_forward_hooks, is_faithful
from repblocks.graph.running import attribute
from repblocks.graph.tracing import Trace, trace

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: ``f(s * x) == s * f(x)`` for ``s > 0``, channel by channel; and what changes nothing in eval mode.
HOMOGENEOUS_LAYERS = (nn.ReLU, nn.LeakyReLU)
NEUTRAL_LAYERS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
#: Pooling is homogeneous too, and no activation: what it picks or averages is of one channel.
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
FUNCTIONS = {F.relu, F.relu_, F.leaky_relu, F.leaky_relu_, torch.relu, torch.relu_, "relu", "relu_", "contiguous"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two convolutions, the second of which reads nothing but the first's output, through ReLU or LeakyReLU.

    Attributes:
        first, second: Names of the convolutions.
    """

    first: str
    second: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """What can be equalized in a model, and what cannot.

    Attributes:
        found: In the order in which they run.
        refused: Every other convolution, and why what follows it cannot take up a scale of its output.
    """

    found: Sequence[Pair]
    refused: Mapping[str, str]


def find_pairs(model: nn.Module) -> Pairs:
    """Trace a model in eval mode and find the pairs; nothing is computed or changed.

    A pair needs a first convolution that one thing reads, no activation but ReLU or LeakyReLU between, and weights that
    nothing else uses. Pooling does not separate a pair; a module whose code cannot be traced does.
    """
    return _Search(trace(model)).pairs()


class _Search:
    """Looks from every convolution along what reads it."""

    def __init__(self, traced: Trace) -> None:
        self.model = traced.root
        self.calls = [node for node in traced.nodes if node.op == "call_module"]
        self.uses = Counter(id(tensor) for node in traced.nodes for tensor in self._tensors(node))

    def pairs(self) -> Pairs:
        found, refused = list[Pair](), dict[str, str]()
        for node in self.calls:
            if isinstance(self._called(node), CONVS):
                end = self._own(node) or self._next(node)
                if isinstance(end, str):
                    refused[str(node.target)] = end
                else:
                    found.append(Pair(first=str(node.target), second=str(end.target)))
        return Pairs(found=found, refused=refused)

    def _next(self, node: fx.Node) -> fx.Node | str:
        """The convolution that alone reads a node, or why there is none."""
        while len(node.users) == 1:
            node = next(iter(node.users))
            if isinstance(self._called(node), CONVS):
                return self._own(node) or node
            if not self._is_homogeneous(node):
                return f"goes to {self._name(node)}, which is no convolution, ReLU or LeakyReLU"
        return f"goes to {len(node.users)} places: {', '.join(map(self._name, node.users))}"

    def _own(self, node: fx.Node) -> str | None:
        """Why the weights of a convolution must stay."""
        conv = self._called(node)
        assert isinstance(conv, CONVS)
        if not is_faithful(conv, CONVS[conv.weight.ndim - 3]):
            hooked = (
                "carries forward hooks" if has_forward_hooks(conv) else "computes something else than its base class"
            )
            return f"{node.target} {hooked}"
        if parametrize.is_parametrized(conv):
            return f"the weights of {node.target} are computed by a parametrization"
        if any(self.uses[id(parameter)] > 1 for parameter in conv.parameters()):
            return f"the weights of {node.target} are used more than once"
        return None

    def _is_homogeneous(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return node.target in FUNCTIONS
        layer = self._called(node)
        known = (*HOMOGENEOUS_LAYERS, *NEUTRAL_LAYERS, *POOLS)
        return layer is not None and any(isinstance(layer, cls) and is_faithful(layer, cls) for cls in known)

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _tensors(self, node: fx.Node) -> Iterator[Tensor]:
        layer = self._called(node)
        if layer is not None:
            yield from layer.parameters()
        elif node.op == "get_attr":
            yield attribute(self.model, str(node.target))

    def _name(self, node: fx.Node) -> str:
        called = self._called(node)
        kind = type(called).__name__ if called is not None else node.name if node.op != "output" else "the output"
        return f"{kind} ({node.target})" if called is not None else kind
