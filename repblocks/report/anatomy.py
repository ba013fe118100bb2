"""A block's branches as text, for its picture and for the table."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.fusion.containers import Branches
from repblocks.report.words import size

#: Longer chains of layers are cut in the middle.
LAYERS_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One branch: its name, and its layers from input to output; none for an identity."""

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Parallel branches between what comes before and after them.

    Attributes:
        before, after: Layers around the branches.
        branches: One where nothing is parallel.
        joined: How the branches come together, ``"+"`` or ``"concat"``.
    """

    before: tuple[str, ...]
    branches: tuple[Branch, ...]
    after: tuple[str, ...]
    joined: str


def anatomy(block: nn.Module) -> Anatomy:
    """The outermost parallel branches of a block; a chain is one branch, named as its class."""
    top = block.branches if isinstance(block, RepConv) and block.form == "train" else block
    container = next((module for module in top.modules() if isinstance(module, Branches)), None)
    if container is None:
        return Anatomy(before=(), branches=(_branch(type(block).__name__, top),), after=(), joined="+")
    before, after = _around(top, container)
    return Anatomy(
        before=before,
        branches=tuple(_branch(name, branch) for name, branch in container.items()),
        after=after,
        joined="+" if type(container).__name__ == "Sum" else "concat",
    )


def _branch(name: str, module: nn.Module) -> Branch:
    return Branch(name=name, layers=_cut(tuple(_layers(module))))


def _cut(layers: tuple[str, ...]) -> tuple[str, ...]:
    if len(layers) <= LAYERS_SHOWN:
        return layers
    kept = LAYERS_SHOWN // 2
    return (*layers[:kept], f"{len(layers) - 2 * kept} more", *layers[-kept:])


def _around(top: nn.Module, container: Branches) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers before and behind the branches, in the order in which their parent lists them."""
    if top is container:
        return (), ()
    links = list(top.children())
    at = next(index for index, link in enumerate(links) if container in set(link.modules()))
    before = [text for link in links[:at] for text in _layers(link)]
    after = [text for link in links[at + 1 :] for text in _layers(link)]
    return tuple(before), tuple(after)


def _layers(module: nn.Module) -> Iterator[str]:
    """Every layer without layers inside; nested branches as one."""
    if isinstance(module, nn.Identity):
        return
    if isinstance(module, Branches) or not list(module.children()):
        yield _words(module)
        return
    for child in module.children():
        yield from _layers(child)


def _words(module: nn.Module) -> str:
    if isinstance(module, Branches):
        return f"{len(module)} branches"
    if isinstance(module, nn.Conv2d):
        depthwise = "dw " if module.groups == module.in_channels > 1 else ""
        fixed = "" if "weight" in dict(module.named_parameters(recurse=False)) else " fixed"
        return f"{depthwise}conv {size(module.kernel_size)}{fixed}"
    kind = type(module).__name__
    known = {
        "ConstantScale2d": "constant scale",
        "LayerScale2d": "scale",
        "AlignedAvgPool2d": "average pool",
        "DropPath": "drop path",
    }
    return "BatchNorm" if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) else known.get(kind, kind)
