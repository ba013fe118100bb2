"""The rows of the report: what went into each region, and why candidates were left."""

from collections.abc import Iterator, Mapping, Sequence

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # base of every BatchNorm

from repblocks.graph.analysis import Analysis
from repblocks.graph.edits import Edit
from repblocks.graph.forms import Cost
from repblocks.graph.hazards import owner_path
from repblocks.graph.operators import CONVOLUTIONS
from repblocks.graph.parts import Part, join, name_of
from repblocks.graph.report import Region, Skipped
from repblocks.graph.running import attribute

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, _BatchNorm)


def region_of(part: Part, edit: Edit, layer: nn.Module, error: float | None) -> Region:
    """The row of one edit."""
    analysis = part.edits.analysis
    before = sum(analysis.costs[node].macs for node in _own(part, edit))
    after = analysis.price(edit.form) or Cost()
    return Region(
        name=name_of(part, edit),
        modules=tuple(_label(part, node) for node in edit.gone()),
        result=repr(layer),
        error=error,
        params_before=_parameters_of(part, edit),
        params_after=sum(p.numel() for p in layer.parameters()),
        macs_before=before,
        macs_after=after.macs,
    )


def _own(part: Part, edit: Edit) -> set[fx.Node]:
    """The nodes that go with an edit, those left out that went with one before it."""
    before = part.edits.edits[: part.edits.edits.index(edit)]
    return set(edit.gone()).difference(*(earlier.gone() for earlier in before))


def _parameters_of(part: Part, edit: Edit) -> int:
    """Parameters of the layers that go, and those that nothing but the code that goes reads."""
    analysis, gone = part.edits.analysis, _own(part, edit)
    all_gone = set[fx.Node]().union(*(other.gone() for other in part.edits.edits))
    read = {str(n.target) for node in gone for n in _constants_of(analysis, node) if n.op == "get_attr"}
    readers = {path: _readers_of(analysis, path) for path in read}
    alone = [attribute(analysis.shadow, path) for path in read if readers[path] <= all_gone]
    layers = [analysis.shadow.get_submodule(str(node.target)) for node in gone if node.op == "call_module"]
    tensors = [p for layer in layers for p in layer.parameters()] + [t for t in alone if isinstance(t, nn.Parameter)]
    return sum(tensor.numel() for tensor in tensors)


def _constants_of(analysis: Analysis, node: fx.Node) -> Iterator[fx.Node]:
    for read in node.all_input_nodes:
        if read in analysis.constants:
            yield read
            yield from _constants_of(analysis, read)


def _readers_of(analysis: Analysis, path: str) -> set[fx.Node]:
    """What is not constant and reads an attribute, or what is calculated from it."""
    waiting = [node for node in analysis.trace.nodes if node.op == "get_attr" and node.target == path]
    found = set[fx.Node]()
    while waiting:
        for user in waiting.pop().users:
            if user in analysis.constants:
                waiting.append(user)
            else:
                found.add(user)
    return found


def _label(part: Part, node: fx.Node) -> str:
    if node.op == "call_module":
        return join(part.path, str(node.target))
    name = getattr(node.target, "__name__", str(node.target))
    return f"{name} in {join(part.path, owner_path(part.edits.analysis.trace, node)) or 'the model'}"


def skipped_in(parts: Sequence[Part], sealed: Mapping[str, str], model: nn.Module) -> list[Skipped]:
    """Everything that has weights and was left, with the reason."""
    rows = [row for part in parts for row in _left(part)]
    whole = [
        Skipped(name=path or "the model", reason=f"{reason}; its inside is collapsed by itself")
        for path, reason in sealed.items()
        if any(isinstance(inner, _WEIGHTED) for inner in model.get_submodule(path).modules())
    ]
    return [*whole, *rows]


def _left(part: Part) -> Iterator[Skipped]:
    analysis = part.edits.analysis
    gone = {node for edit in part.edits.edits for node in edit.dead}
    for node in analysis.trace.nodes:
        reason = _reason(part, node) if node not in gone and _is_candidate(analysis, node) else None
        if reason:
            yield Skipped(name=_label(part, node), reason=reason)


def _is_candidate(analysis: Analysis, node: fx.Node) -> bool:
    if node.op != "call_module":
        return node.target in CONVOLUTIONS or getattr(node.target, "__name__", "") in ("batch_norm", "linear")
    return isinstance(analysis.shadow.get_submodule(str(node.target)), _WEIGHTED)


def _reason(part: Part, node: fx.Node) -> str | None:
    analysis = part.edits.analysis
    if node in analysis.barred:
        return analysis.barred[node] or None
    if node in part.banned:
        return "merging it would rewrite code that has other effects than its result"
    if node in analysis.refusals:
        return analysis.refusals[node]
    reads = [read for read in node.all_input_nodes if analysis.is_tensor(read)]
    if any(read in analysis.tainted for read in reads):
        return "what it reads is changed in place while others read it"
    if node in analysis.forms and any(read in analysis.forms for read in reads):
        return "merging it with what is before it would cost more"
    return None
