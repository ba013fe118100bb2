"""`collapse`: a deploy copy of any model, in which every linear region is the cheapest exact form of itself."""

import math
from collections.abc import Callable, Sequence, Set
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # base of every BatchNorm
from torch.nn.parameter import is_lazy

from repblocks.errors import ConfigurationError
from repblocks.graph.edits import Edit
from repblocks.graph.parts import Part, built, join, parts_of
from repblocks.graph.proof import output, prove, require_repeatable, scratch_copy
from repblocks.graph.report import CollapseReport
from repblocks.graph.rewriting import Unwritable, rewritten, written_calls
from repblocks.graph.rows import region_of, skipped_in
from repblocks.graph.running import tensors_in
from repblocks.graph.surgery import Surgery, inherit, inherit_hooks
from repblocks.graph.tracing import Call

Where = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


class Collapsed(NamedTuple):
    """A deploy copy, and what was done to get there."""

    model: nn.Module
    report: CollapseReport


def collapse(model: nn.Module, example_input: Any, *, where: Where = None, tolerance: float | None = None) -> Collapsed:
    """A deploy copy of any model: ``collapse(model, x).model(x) == model(x)``, its linear regions merged.

    The graph of the model is read, not its classes: convolutions, BatchNorm, sums, concatenations, slices, scales,
    padding, average pooling and linear layers between two nonlinear operations become the cheapest exact form, with
    never more multiply-accumulates than before. The copy is edited layer by layer, so that classes, methods and names
    stay; where code has to change, the innermost module around it becomes an ``nn.Sequential`` or ``fx.GraphModule``.

    Args:
        model: Any module in eval mode; it is not changed.
        example_input: A tensor, or a tuple of arguments; its size decides which form is cheaper.
        where: Limits it to modules of these names (a glob such as ``"stages.0.*"``, several, or a predicate on the
            name) and what is inside of them.
        tolerance: Largest relative error that counts as equal; None takes it from the table of `verify`.

    Returns:
        The copy in eval mode, and a report of regions and of what was skipped; it unpacks.

    Raises:
        ConfigurationError: The model is in training mode, scripted, quantized, without numbers, or random in eval
            mode; it fails on the example input, or there is none; ``where`` matches nothing.
        FoldError: A region folds to weights that are not finite; it is named.
        VerificationError: The copy differs from the model; the region that differs most is named.

    Source: of folding, Ding et al. 2021, "RepVGG", https://arxiv.org/abs/2101.03697, section 3.3.
    """
    args = as_arguments(example_input)
    require_plain(model)
    _require_tolerance(tolerance)
    with torch.inference_mode(mode=False):
        first, settled = _collapsed(model, args, where, tolerance)
        if settled:
            return first
        second, _ = _collapsed(first.model, args, None, tolerance)
        return Collapsed(second.model, first.report.followed_by(second.report)) if second.report.regions else first


def _collapsed(
    model: nn.Module, args: tuple[Any, ...], where: Where, tolerance: float | None
) -> tuple[Collapsed, bool]:
    """Collapse once; also whether another time would find nothing more."""
    scratch = scratch_copy(model)
    require_repeatable(scratch, args)
    work = _Collapse(model, args, where)
    tried = scratch_copy(work.model)  # models may count their calls
    if not _finds_its_attributes(tried, args):
        work = _Collapse(model, args, where, keeps_methods=True)
        tried = scratch_copy(work.model)
    equivalence, other_sizes, errors = prove(scratch, tried, args, work.parts, work.layers, tolerance)
    rows = [region_of(part, edit, work.layers[edit], errors.get(edit)) for part, edit in work.edits()]
    report = CollapseReport(
        regions=rows,
        skipped=skipped_in(work.parts, work.sealed, model),
        rewritten=work.renewed,
        equivalence=equivalence,
        other_sizes=other_sizes,
    )
    unused = any(part.pinned or part.edits.analysis.trace.handed_on() for part in work.parts)
    return Collapsed(work.model, report), where is not None or not (unused and work.renewed)


def _finds_its_attributes(model: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether no code misses a method of a module that has new code."""
    try:
        output(model, args)
    except AttributeError:
        return False
    return True


def collapse_unverified(model: nn.Module, example_input: Any, *, where: Where = None) -> nn.Module:
    """The copy of `collapse`, not compared with the model."""
    return _Collapse(model, as_arguments(example_input), where).model


def as_arguments(example_input: Any) -> tuple[Any, ...]:
    """The arguments of a call of the model.

    Raises:
        ConfigurationError: There is no tensor among them.
    """
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    if not tensors_in(args):
        raise ConfigurationError(
            f"got {type(example_input).__name__} as example_input; collapse needs a tensor such as "
            "torch.randn(1, 3, 224, 224), or a tuple of the model's arguments: their size decides which form is cheaper"
        )
    return args


def _require_tolerance(tolerance: Any) -> None:
    known = tolerance is None or (isinstance(tolerance, int | float) and 0 < tolerance < math.inf)
    if not known:
        raise ConfigurationError(f"got tolerance={tolerance!r}; needed a positive number, or None for the table's")


def require_plain(model: Any) -> None:
    """Check that a model is one whose code and numbers can be read.

    Raises:
        ConfigurationError: It is not.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"got {type(model).__name__}; collapse needs an nn.Module")
    for name, module in model.named_modules():
        reason = _unreadable(module)
        if reason:
            raise ConfigurationError(f"{name or type(model).__name__} {reason}")


def _unreadable(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted, so its code cannot be read; collapse the nn.Module that it was made from, then script that"
    if type(module).__name__ == "OptimizedModule":
        return "is compiled, so its code cannot be read; collapse model._orig_mod, then compile that"
    if "quantized" in type(module).__module__.split("."):
        return "is quantized, and quantized weights do not merge exactly; collapse first, then quantize"
    if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None:
        return (
            "is a BatchNorm in training mode, which follows each batch; a collapsed model equals the eval-mode model "
            "only: call model.eval() first"
        )
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(is_lazy(tensor) for tensor in tensors):
        return "has no weights yet; run the model once on an input"
    if any(tensor.is_meta for tensor in tensors):
        return (
            'is on the meta device and has no numbers; load its weights first: to_empty(device="cpu"), load_state_dict'
        )
    return None


class _Collapse:
    """One collapse: the parts, the new layers, and the edited copy."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], where: Where, *, keeps_methods: bool = False) -> None:
        self.keeps_methods = keeps_methods
        self.parts, self.sealed = parts_of(model, args, {}, selected(model, where))
        self.layers = dict[Edit, nn.Module]()
        self.renewed = list[str]()
        for part in self.parts:
            _leave_stateful_code(part)
        while (missing := self._edit(model)) is not None:
            part, call, node = missing
            if node in part.pinned:  # it is not a tensor that could be kept
                part.banned |= {edit.node for edit in part.edits.edits if _reaches(part, edit, call)}
            part.pinned.add(node)
            part.replan()

    def edits(self) -> list[tuple[Part, Edit]]:
        return [(part, edit) for part in self.parts for edit in part.edits.edits]

    def _edit(self, model: nn.Module) -> tuple[Part, Call, fx.Node] | None:
        """Edit a fresh copy; returns a tensor that turns out to be needed, if there is one."""
        self.layers = {edit: layer for part in self.parts for edit, layer in built(part).items()}
        surgery = Surgery(model, self._dropped())
        for part, edit in self.edits():
            for path in edit.idle:
                idle = nn.Identity()
                inherit(idle, part.inside(model).get_submodule(path))
                surgery.replace(join(part.path, path), idle)
            if edit.host is not None:
                inherit_hooks(self.layers[edit], part.inside(model).get_submodule(edit.host))
                surgery.replace(join(part.path, edit.host), self.layers[edit])
        self.renewed = []
        for part in self.parts:
            for writer in written_calls(part.edits, part.inside(surgery.model), self.layers):
                call = writer.call
                try:
                    new = rewritten(writer, part.inside(surgery.model), keeps_methods=self.keeps_methods)
                except Unwritable as error:
                    return part, call, error.node
                surgery.replace(join(part.path, call.path), new)
                self.renewed.append(join(part.path, call.path) or "the model")
        self.model = surgery.model.eval()
        return None

    def _dropped(self) -> list[str]:
        """Paths of the modules that a copy does not need."""
        found = list[str]()
        for part, edit in self.edits():
            gone = [node for node in edit.gone() if node not in edit.form.passed and node.op == "call_module"]
            spliced = [str(node.target) for node in gone] if edit.owner else []
            host = [edit.host] if edit.host is not None else []
            found += [join(part.path, path) for path in (*host, *edit.idle, *spliced)]
        return found


def selected(model: nn.Module, where: Where) -> Callable[[str], bool]:
    """Whether a module, by its path, is inside of what ``where`` names.

    Raises:
        ConfigurationError: It names nothing.
    """
    if where is None:
        return lambda path: True
    named = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    if callable(where):
        chosen = {name for name, module in named if where(name, module)}
        _require_some(chosen, "where", named)
    else:
        globs: list[Any] = list(where) if isinstance(where, tuple | list) else [where]
        chosen = {name for glob in globs or [None] for name in _matching(glob, named)}
    return lambda path: any(".".join(path.split(".")[: depth + 1]) in chosen for depth in range(path.count(".") + 1))


def _matching(glob: Any, named: Sequence[tuple[str, nn.Module]]) -> set[str]:
    if not isinstance(glob, str):
        raise ConfigurationError(
            f"got {glob!r} in where; needed a glob of names, several, or a predicate (name, module)"
        )
    found = {name for name, _ in named if fnmatchcase(name, glob)}
    _require_some(found, f"where={glob!r}", named)
    return found


def _require_some(found: Set[str], what: str, named: Sequence[tuple[str, nn.Module]]) -> None:
    if not found:
        raise ConfigurationError(f"{what} matches no module; names are like {', '.join(name for name, _ in named[:3])}")


def _reaches(part: Part, edit: Edit, call: Call) -> bool:
    """Whether an edit changes code inside of a call."""
    owners = [edit.owner, *(part.edits.analysis.trace.owners[node] for node in edit.elided)]
    return any(owner is not None and call in owner.around() for owner in owners)


def _leave_stateful_code(part: Part) -> None:
    """Code that changes attributes of its module stays: a graph would not change them."""
    trace = part.edits.analysis.trace
    stateful = [call for call in trace.calls if call.path in trace.stateful]
    while caught := {edit.node for edit in part.edits.edits for call in stateful if _rewrites(part, edit, call)}:
        part.banned |= caught
        part.replan()


def _rewrites(part: Part, edit: Edit, call: Call) -> bool:
    """Whether an edit changes the code of a call itself, or does away with the call."""
    trace = part.edits.analysis.trace
    whole = edit.host is not None and edit.host not in edit.layers()
    replaced = whole and (not edit.host or f"{call.path}.".startswith(f"{edit.host}."))
    return replaced or edit.owner is call or any(trace.owners[node] is call for node in edit.elided)
