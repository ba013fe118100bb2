"""The parts of a model that are traced on their own, and what becomes of each."""

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from repblocks.blocks.copying import copied, on_meta
from repblocks.errors import FoldError
from repblocks.graph.analysis import Analysis
from repblocks.graph.copies import duplicate
from repblocks.graph.edits import Edit, Edits, edits_of
from repblocks.graph.hazards import barred, owner_path, tainted
from repblocks.graph.layers import layer_of
from repblocks.graph.plan import plan, regions
from repblocks.graph.rules import analyse
from repblocks.graph.running import Values, inputs_of, run, shapes
from repblocks.graph.tracing import Trace, trace


@dataclass(eq=False, slots=True)
class Part:
    """A module that is traced on its own: the model, or one that the trace around it could not go through.

    Attributes:
        path: In the model.
        args, kwargs: What it is called with.
        edits: What becomes of it.
        pinned: Tensors that have to exist, whoever reads them.
        banned: Tensors that have to be calculated as they are.
    """

    path: str
    args: Any
    kwargs: Any
    edits: Edits
    pinned: set[fx.Node] = field(default_factory=set[fx.Node])
    banned: set[fx.Node] = field(default_factory=set[fx.Node])

    def replan(self) -> None:
        """Plan again, with what is pinned and banned by now."""
        self.edits = planned(self.edits.analysis, self.pinned, self.banned)

    def inside(self, model: nn.Module) -> nn.Module:
        """This part of the model, or of a copy."""
        return model.get_submodule(self.path)


def parts_of(
    model: nn.Module, args: Any, kwargs: Any, allowed: Callable[[str], bool]
) -> tuple[list[Part], dict[str, str]]:
    """Trace and analyse a model, and what it cannot be traced through on its own. Also why not, by path."""
    shadow = copied(model, on_meta).eval()
    parts, sealed = list[Part](), dict[str, str]()
    waiting: list[tuple[str, Any, Any]] = [("", args, kwargs)]
    while waiting:
        path, given, named = waiting.pop(0)
        inner = shadow.get_submodule(path)
        traced = trace(inner, given, named)
        sealed |= {join(path, name): reason for name, reason in traced.sealed.items()}
        if "" in traced.sealed:
            children = [name for name, _ in inner.named_children()]
        else:
            parts.append(_analysed(traced, model, path, inner, given, named, allowed))
            children = list(traced.sealed)
        found = _inputs(model, path, inner, children, given, named)
        waiting += [(join(path, name), *found[name]) for name in children if name in found]
    return parts, sealed


def join(path: str, name: str) -> str:
    """The path of something in a module at a path."""
    return f"{path}.{name}" if path and name else path or name


def _inputs(model: nn.Module, path: str, shadow: nn.Module, children: list[str], args: Any, kwargs: Any) -> Any:
    """What children of a module are called with; on the meta device if that is enough."""
    if not children:
        return {}
    moved = pytree.tree_map_only(Tensor, on_meta, (args, kwargs))
    try:
        with torch.device("meta"):
            return inputs_of(shadow, children, *moved)
    except Exception:  # code that asks for numbers
        return inputs_of(duplicate(model.get_submodule(path)).eval(), children, args, kwargs)


def _analysed(
    traced: Trace,
    model: nn.Module,
    path: str,
    shadow: nn.Module,
    args: Any,
    kwargs: Any,
    allowed: Callable[[str], bool],
) -> Part:
    values, changed = _observed(traced, shadow, model.get_submodule(path), args, kwargs)
    analysis = Analysis(
        trace=traced,
        model=model.get_submodule(path),
        shadow=shadow,
        values=values,
        barred=barred(traced, shadow, values, lambda name: allowed(join(path, name))),
        tainted=changed,
    )
    return Part(path, args, kwargs, planned(analyse(analysis)))


def _observed(
    traced: Trace, shadow: nn.Module, model: nn.Module, args: Any, kwargs: Any
) -> tuple[Values, set[fx.Node]]:
    """The shapes of all results, and the tensors that are changed in place; by numbers if shapes do not suffice."""
    try:
        values = shapes(traced, shadow, args, kwargs)
    except Exception:  # an operation of the user's code that asks for numbers
        with torch.no_grad():
            values = dict(run(traced, duplicate(model).eval(), args, kwargs))
    changed = tainted(traced, shadow, values)
    return pytree.tree_map_only(Tensor, on_meta, values), changed


def planned(analysis: Analysis, pinned: Set[fx.Node] = frozenset(), banned: Set[fx.Node] = frozenset()) -> Edits:
    """The edits that the cheapest plans ask for; ``pinned`` and ``banned`` as in `Part`."""
    found = Edits(analysis)
    for region in regions(analysis, pinned):
        chosen = plan(analysis, region, banned)
        if chosen is not None:
            found.edits += edits_of(analysis, chosen)
    return found


def built(part: Part) -> dict[Edit, nn.Module]:
    """The new layer of every edit of a part.

    Raises:
        FoldError: A region folds to values that are not finite; the message names it.
    """
    return {edit: _built(part, edit) for edit in part.edits.edits}


def _built(part: Part, edit: Edit) -> nn.Module:
    analysis, form = part.edits.analysis, edit.form
    size = analysis.place_size(form)
    weighted = [name for name in edit.layers() if any(True for _ in analysis.shadow.get_submodule(name).parameters())]
    like = analysis.model.get_submodule(weighted[0] if weighted else edit.owner.path if edit.owner else "")
    dtype = analysis.values[form.anchor.node].dtype
    try:
        return layer_of(form.value.numbers(), axis=form.axis, ndim=len(size), dtype=dtype, like=like)
    except FoldError as error:
        raise FoldError(f"{name_of(part, edit)} does not collapse: {error}") from error


def name_of(part: Part, edit: Edit) -> str:
    """Where an edit is: the path of what it replaces, or of the module whose code it changes and the tensor."""
    analysis = part.edits.analysis
    inner = edit.host if edit.host is not None else owner_path(analysis.trace, edit.node)
    return join(part.path, inner) or str(edit.node)
