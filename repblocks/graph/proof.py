"""Is the collapsed copy the same function? Whole, on other sizes, and region by region."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from repblocks.errors import ConfigurationError, VerificationError
from repblocks.graph.copies import duplicate
from repblocks.graph.edits import Edit
from repblocks.graph.parts import Part, name_of
from repblocks.graph.running import apply, inputs_of, run, tensors_in
from repblocks.verification import EquivalenceReport, distance, verify

Layers = Mapping[Edit, nn.Module]


def require_repeatable(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Check that a model runs on the example input, and twice the same.

    Raises:
        ConfigurationError: It does not.
    """
    try:
        first, second = output(model, args), output(model, args)
    except Exception as error:
        raise ConfigurationError(
            f"the model fails on example_input: {type(error).__name__}: {error}; give inputs that it takes: a tensor, "
            "or a tuple of its arguments"
        ) from error
    if _are_finite(first) and distance(first, second)[1] > 1e-3:
        raise ConfigurationError(
            "the model gives another output for the same input each time, so nothing can equal it; does it draw random "
            "numbers in eval mode? F.dropout needs training=self.training"
        )


def _are_finite(output: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors_in(output) if tensor.is_floating_point())


def output(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """What a model gives, on copies of its arguments."""
    with torch.no_grad():
        return model(*pytree.tree_map_only(Tensor, torch.clone, args))


def prove(
    model: nn.Module,
    edited: nn.Module,
    args: tuple[Any, ...],
    parts: Sequence[Part],
    layers: Layers,
    tolerance: float | None,
) -> tuple[EquivalenceReport, str, dict[Edit, float]]:
    """Compare a model with its collapsed copy.

    Args:
        model: A copy of the user's, in eval mode.
        edited: The collapsed copy.
        args: The example input.
        parts: What was changed.
        layers: The new layer of every edit.
        tolerance: Largest relative error; None takes it from the table.

    Returns:
        The comparison on the example input, what other sizes gave in words, the error of every region.

    Raises:
        VerificationError: The two differ; the region that differs most is named.
    """
    errors = region_errors(model, args, parts, layers)
    report = verify(model, edited, args, tolerance=tolerance)
    _require(report, "the collapsed model", parts, errors)
    return report, _on_other_sizes(model, edited, args, parts, layers, tolerance), errors


def _require(report: EquivalenceReport, what: str, parts: Sequence[Part], errors: Mapping[Edit, float]) -> None:
    if not report.passed:
        names = {edit: name_of(part, edit) for part in parts for edit in part.edits.edits}
        worst = max(errors, key=lambda edit: errors[edit], default=None)
        place = f"; most in {names[worst]} (relative error {errors[worst]:.2g})" if worst is not None else ""
        raise VerificationError(f"{what} differs{place}: {report}")


def _on_other_sizes(
    model: nn.Module,
    edited: nn.Module,
    args: tuple[Any, ...],
    parts: Sequence[Part],
    layers: Layers,
    tolerance: float | None,
) -> str:
    sizes = [("another size and batch", _resized(args, grown)) for grown in (_a_step_larger, _twice_as_large)]
    for what, other in (*sizes, ("another batch", _resized(args, _as_large))):
        try:
            with redirect_stderr(StringIO()):  # graph modules print their code when it fails
                output(model, other)
        except Exception:  # the model is made for one size
            continue
        report = verify(model, edited, other, tolerance=tolerance)
        if not report.passed:
            _require(report, f"the collapsed model on {what}", parts, region_errors(model, other, parts, layers))
        return f"equal on {what} (relative error {report.relative_error:.2g})"
    return "not compared: the model takes the size of example_input only"


def _a_step_larger(side: int, place: int) -> int:
    """By 32 or 64 pixels, which models of real size take; by a quarter or half where that would be much."""
    return side + (32, 64)[place % 2] if side >= 128 else side + max(side // (4, 2)[place % 2], 1)


def _twice_as_large(side: int, place: int) -> int:
    return 2 * side if side < 128 else side + 128


def _as_large(side: int, place: int) -> int:
    return side


def _resized(args: tuple[Any, ...], grown: Callable[[int, int], int]) -> tuple[Any, ...]:
    """Random inputs like the given ones, with one sample more and other maps."""
    generator = torch.Generator().manual_seed(0)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.ndim:
            return tensor
        spatial = [grown(side, place) for place, side in enumerate(tensor.shape[2:])]
        size = (len(tensor) + 1, *tensor.shape[1:2], *spatial)
        drawn = torch.randn(size, generator=generator, dtype=torch.float64)
        scale = tensor.double().std().item() if tensor.numel() > 1 else 1.0
        return (drawn * (scale or 1.0) + tensor.double().mean().item()).to(tensor)

    return pytree.tree_map_only(Tensor, other, args)


def region_errors(model: nn.Module, args: tuple[Any, ...], parts: Sequence[Part], layers: Layers) -> dict[Edit, float]:
    """Relative error of every new layer on what the old ones read, in the model's own dtype."""
    inner = [part.path for part in parts if part.path]
    given = inputs_of(model, inner, pytree.tree_map_only(Tensor, torch.clone, args), {}) if inner else {}
    errors = dict[Edit, float]()
    with torch.no_grad():
        for part in parts:
            own = given.get(part.path, (args, {})) if part.path else (args, {})
            own = pytree.tree_map_only(Tensor, torch.clone, own)
            errors |= dict(_errors_in(part, part.inside(model), own, layers))
    return errors


def _errors_in(part: Part, model: nn.Module, given: Any, layers: Layers) -> Iterator[tuple[Edit, float]]:
    edits = {edit.node: edit for edit in part.edits.edits}
    anchors = {edit.form.anchor.node for edit in edits.values()}
    seen = dict[fx.Node, Any]()
    for node, value in run(part.edits.analysis.trace, model, *given):
        if node in anchors or not isinstance(value, Tensor):
            seen[node] = value.clone() if isinstance(value, Tensor) else value  # it may be changed in place later
        if node in edits:
            edit = edits[node]
            yield edit, distance(value, _renewed(part, edit, layers[edit], model, seen))[1]


def _renewed(part: Part, edit: Edit, layer: nn.Module, model: nn.Module, seen: Mapping[fx.Node, Any]) -> Tensor:
    """The tensor of an edit in the new way."""
    form, values = edit.form, part.edits.analysis.values
    anchor = seen[form.anchor.node]
    count = form.anchor.stop - form.anchor.start
    tensor = (
        anchor.narrow(form.axis, form.anchor.start, count)
        if not form.views and count != anchor.shape[form.axis]
        else anchor
    )
    tensor = layer(tensor) if form.leads else tensor
    for view in form.views:
        read = view.all_input_nodes[0]

        def value(node: fx.Node, read: fx.Node = read, current: Tensor = tensor) -> Any:
            return current if node is read else seen.get(node, values[node])

        args, kwargs = map_arg((view.args, view.kwargs), value)  # pyright: ignore[reportArgumentType]
        tensor = apply(view, model, args, kwargs)
    return tensor if form.leads else layer(tensor)


def scratch_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that may run: what it remembers of its inputs does not reach the user's model."""
    return duplicate(model).eval()
