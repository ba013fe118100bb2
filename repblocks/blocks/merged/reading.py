"""The branches of a block, read as sums and chains of norms over linear leaves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from timm.layers import LayerScale2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # base of every BatchNorm

from repblocks.blocks.layers import Constant, Shift
from repblocks.fusion import Sum
from repblocks.fusion.faithful import is_faithful

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_DIAGONAL = (*_NORMS, LayerScale2d, Constant, Shift, nn.Identity)
"""Maps that only scale and shift each channel, so that nothing has to be materialised in front of them."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A part that runs as it is, over the block's input; None is the input itself."""

    module: nn.Module | None

    @property
    def follows_batch(self) -> bool:
        """Whether a norm inside uses the statistics of the batch, so that the part is no fixed linear map."""
        return self.module is not None and holds_batch_norms(self.module)


@dataclass(frozen=True, slots=True)
class Chain:
    """Diagonal maps, BatchNorm among them, behind a part."""

    first: "Node"
    links: tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True)
class Total:
    """Parts over one input, added."""

    parts: tuple["Node", ...]


Node = Leaf | Chain | Total


def read(module: nn.Module) -> Node:
    """The branches as leaves, chains and sums. What has no batch norm inside, and what is not understood, is a leaf."""
    if not holds_batch_norms(module):
        return Leaf(None if isinstance(module, nn.Identity) else module)
    if is_batch_norm(module) and _is_diagonal(module):
        return Chain(Leaf(None), (module,))
    if isinstance(module, Sum) and is_faithful(module, Sum):
        return Total(tuple(map(read, module.values())))
    if isinstance(module, nn.Sequential) and is_faithful(module, nn.Sequential):
        return _read_chain(list(module))
    return Leaf(module)


def _read_chain(members: list[nn.Module]) -> Node:
    """Split off the diagonal maps at the end; one part in front of them is read on, several are a leaf."""
    start = len(members)
    while start and _is_diagonal(members[start - 1]):
        start -= 1
    front, links = members[:start], tuple(members[start:])
    if len(front) > 1:
        first: Node = Leaf(nn.Sequential(*front))
    else:
        first = read(front[0]) if front else Leaf(None)
    return Chain(first, links) if links else first


def _is_diagonal(module: nn.Module) -> bool:
    return any(is_faithful(module, cls) for cls in _DIAGONAL if isinstance(module, cls))


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that uses the statistics of the batch."""
    return isinstance(module, _NORMS) and (module.training or module.running_mean is None)


def holds_batch_norms(module: nn.Module) -> bool:
    """Whether any norm inside follows the batch, of whatever class."""
    return any(
        isinstance(part, _BatchNorm) and (part.training or part.running_mean is None) for part in module.modules()
    )


def leaves(node: Node) -> Iterator[Leaf]:
    """Every leaf, in order."""
    if isinstance(node, Leaf):
        yield node
    else:
        yield from chain.from_iterable(map(leaves, node.parts if isinstance(node, Total) else (node.first,)))


def norms(node: Node) -> Iterator[nn.BatchNorm2d]:
    """Every norm among the chains that follows the batch, in the order of evaluation."""
    if isinstance(node, Total):
        yield from chain.from_iterable(map(norms, node.parts))
    elif isinstance(node, Chain):
        yield from norms(node.first)
        yield from (link for link in node.links if is_batch_norm(link))  # pyright: ignore[reportReturnType]


def flat_terms(node: Node) -> list[tuple[Leaf, nn.BatchNorm2d]] | None:
    """The node as a sum of ``norm(leaf)`` and nothing else, or None where it is more than that."""
    parts = node.parts if isinstance(node, Total) else (node,)
    terms: list[tuple[Leaf, nn.BatchNorm2d]] = []
    for part in parts:
        plain = isinstance(part, Chain) and isinstance(part.first, Leaf) and len(part.links) == 1
        if not plain or not is_batch_norm(part.links[0]):  # pyright: ignore[reportAttributeAccessIssue]
            return None
        terms.append((part.first, part.links[0]))  # pyright: ignore
    return terms


def normed_terms(node: Node) -> tuple[list[tuple[Leaf, nn.BatchNorm2d | None]], nn.BatchNorm2d | None]:
    """The node as a norm behind a sum of ``norm(leaf)`` and leaves: summands and the norm; none if it is not that."""
    behind = isinstance(node, Chain) and isinstance(node.first, Total) and len(node.links) == 1
    if not behind or not is_batch_norm(node.links[0]):  # pyright: ignore[reportAttributeAccessIssue]
        return [], None
    terms: list[tuple[Leaf, nn.BatchNorm2d | None]] = []
    for part in node.first.parts:  # pyright: ignore
        flat = [(part, None)] if isinstance(part, Leaf) else flat_terms(part)
        if flat is None or len(flat) > 1:
            return [], None
        terms += flat
    return terms, node.links[0]  # pyright: ignore


def parameters(node: Node, only: Sequence[Leaf]) -> list[nn.Parameter]:
    """Parameters of the chains' links and of some of the leaves, each once."""
    modules = [link for part in _chains(node) for link in part.links]
    modules += [leaf.module for leaf in only if leaf.module is not None]
    return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))


def _chains(node: Node) -> Iterator[Chain]:
    if isinstance(node, Chain):
        yield node
        yield from _chains(node.first)
    elif isinstance(node, Total):
        yield from chain.from_iterable(map(_chains, node.parts))


def plain_conv(leaf: Leaf) -> nn.Conv2d | None:
    """The convolution that a leaf consists of, with parameters of its own."""
    module = leaf.module
    plain = isinstance(module, nn.Conv2d) and isinstance(vars(module)["_parameters"].get("weight"), Tensor)
    return module if plain else None  # pyright: ignore[reportReturnType]
