"""Are two models the same function? Reports, and the one table of numbers that count as equal."""

import copy
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from repblocks.errors import VerificationError

Scope = Literal["block", "model"]

#: Largest ``max|a - b| / max|a|`` at which a candidate ``b`` equals its reference ``a``.
TOLERANCES: Mapping[torch.dtype, Mapping[Scope, float]] = {
    torch.float64: {"block": 1e-12, "model": 1e-11},
    torch.float32: {"block": 1e-5, "model": 1e-4},
}
#: In half precision the candidate may be this many times as far from the float64 model as the reference itself is.
HALF_PRECISION_FACTOR = 2.0
HALF_PRECISION = (torch.bfloat16, torch.float16)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, slots=True, kw_only=True)
class EquivalenceReport:
    """How far a candidate is from its reference, and how far it may be.

    Attributes:
        dtype: Precision whose rule of the table was applied, such as ``"float32"``.
        scope: ``"block"`` or ``"model"``, the column of the table.
        max_abs_error: ``max|a - b|`` over all outputs.
        relative_error: ``max|a - b| / max|a|``, the largest over the outputs; infinite for non-finite outputs.
            In half precision ``a`` is the output of the reference in float64.
        tolerance: Largest relative error that counts as equal.
        samples: Inputs compared.
    """

    dtype: str
    scope: Scope
    max_abs_error: float
    relative_error: float
    tolerance: float
    samples: int

    @property
    def passed(self) -> bool:
        """Whether the two count as equal."""
        return self.relative_error <= self.tolerance < math.inf

    def to_dict(self) -> dict[str, Any]:
        """The fields and ``passed``, for JSON."""
        return {**asdict(self), "passed": self.passed}

    def raise_if_different(self, what: str) -> None:
        """Do nothing if the two count as equal.

        Args:
            what: The subject of the message, such as ``"the deploy form"``.

        Raises:
            VerificationError: They do not.
        """
        if not self.passed:
            raise VerificationError(f"{what} differs: {self}")

    def __str__(self) -> str:
        finite = "" if math.isfinite(self.relative_error) else " (non-finite outputs)"
        return (
            f"relative error {self.relative_error:.2g}{finite}, at most {self.tolerance:.2g} counts as equal "
            f"({self.scope} in {self.dtype}, {self.samples} samples)"
        )


def verify(
    reference: nn.Module,
    candidate: Callable[..., Any],
    inputs: Tensor | tuple[Any, ...],
    *,
    scope: Scope = "model",
    tolerance: float | None = None,
) -> EquivalenceReport:
    """Compare the outputs of two models on the same inputs by the table of tolerances.

    Both run in eval mode without gradients, each with its own copy of the inputs; neither is changed. In half
    precision both are compared with a float64 copy of the reference, and the candidate may be at most twice as far
    from it as the reference is.

    Args:
        reference: What the candidate has to equal. Its coarsest parameter dtype chooses the rule.
        candidate: A module, or any function of the inputs (a runtime that executes an exported file).
        inputs: ``[N, ...]``, in the dtype and on the device of the models; a tuple is several arguments.
        scope: Column of the table: ``"block"`` for one block, ``"model"`` for a whole network.
        tolerance: Largest relative error that counts as equal, in place of the table's.

    Returns:
        The report; ``raise_if_different`` turns a failed one into an error. Outputs may be a tensor or tuples, lists
        and dicts of tensors.

    Raises:
        VerificationError: A model is in train mode, where BatchNorm uses batch statistics; the outputs differ in
            number or shape; there are no inputs; there is no rule for the dtype.
    """
    _refuse_batch_statistics(reference=reference, candidate=candidate)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    samples = _count_samples(args)
    with evaluating(reference, candidate), torch.no_grad():
        expected, got = reference(*_cloned(args)), candidate(*_cloned(args))
    dtype = _coarsest_dtype(reference, args)
    if dtype in HALF_PRECISION and tolerance is None:
        rounded, expected = expected, _run_in_float64(reference, args)
        tolerance = HALF_PRECISION_FACTOR * distance(expected, rounded)[1]
    absolute, relative = distance(expected, got)
    return EquivalenceReport(
        dtype=str(dtype).removeprefix("torch."),
        scope=scope,
        max_abs_error=absolute,
        relative_error=relative,
        tolerance=_tolerance(dtype, scope) if tolerance is None else tolerance,
        samples=samples,
    )


def _count_samples(args: tuple[Any, ...]) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    samples = len(tensors[0]) if tensors and tensors[0].ndim else 0
    if not samples:
        raise VerificationError("got no inputs (a batch of 0 images); at least one is needed to compare two models")
    return samples


def _cloned(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return pytree.tree_map_only(Tensor, torch.clone, args)


def block_errors(reference: nn.Module, candidate: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Relative error of every block by itself: the candidate's blocks get the reference's recorded inputs.

    Errors do not accumulate from block to block as they do in the models' outputs, so the largest one points at the
    block that went wrong. Blocks are the modules whose name exists in both models (``""`` is the whole model); their
    classes and forms may differ. Left out are

    * modules that the reference calls with anything but one tensor, or that return anything but one tensor;
    * modules that the reference does not call;
    * modules whose namesake refuses the input or answers in another shape: parts inside a block that collapses only
      as a whole (the dirac-expanded convs of RepNeXt); the block around them is compared.

    Args:
        reference: Runs once on the inputs, in eval mode.
        candidate: Its modules run on the inputs that the reference's modules saw.
        inputs: ``[N, ...]``, in the dtype and on the device of the models.

    Returns:
        Relative error by module name; the largest where a module is called more than once.

    Raises:
        VerificationError: A model is in train mode, where BatchNorm uses batch statistics.
    """
    _refuse_batch_statistics(reference=reference, candidate=candidate)
    namesakes = dict(candidate.named_modules())
    errors: dict[str, float] = {}
    with evaluating(reference, candidate), torch.no_grad(), ExitStack() as hooks:
        for name, module in reference.named_modules():
            if name in namesakes:
                _record_error(module, namesakes[name], name, errors, hooks)
        reference(inputs.clone())
    return errors


def most_different(errors: Mapping[str, float]) -> str:
    """The block to look at: the innermost one that explains the error of the blocks around it.

    From the whole model downwards, the walk enters the worst inner block as long as that has at least a tenth of
    the error of the block around it; a smaller error is rounding, and the fault lies in how the parts are wired.

    Args:
        errors: Of ``block_errors``.

    Returns:
        A name of ``errors``; ``""`` is the model itself.
    """
    name = ""
    while inner := [other for other in errors if other != name and (not name or other.startswith(f"{name}."))]:
        worst = max(inner, key=lambda other: (errors[other], -other.count(".")))
        if errors[worst] == 0 or errors[worst] < 0.1 * errors.get(name, 0.0):
            break
        name = worst
    return name


def _refuse_batch_statistics(**models: object) -> None:
    for role, model in models.items():
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        using = [name for name, module in modules if isinstance(module, _BATCH_NORMS) and module.training]
        if using:
            raise VerificationError(
                f"the {role} is in train mode: {len(using)} BatchNorm layers (first: {using[0]!r}) would use batch "
                f"statistics, which no collapsed model can equal; call {role}.eval() first"
            )


@contextmanager
def evaluating(*models: object) -> Generator[None]:
    """Eval mode for a moment, without calling ``train()`` or ``eval()``, which modules may override."""
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _coarsest_dtype(reference: nn.Module, args: tuple[Any, ...]) -> torch.dtype:
    tensors = list(reference.parameters()) or [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max(dtypes or {torch.get_default_dtype()}, key=lambda dtype: torch.finfo(dtype).eps)


def _tolerance(dtype: torch.dtype, scope: Scope) -> float:
    if dtype not in TOLERANCES:
        known = ", ".join(str(known) for known in (*TOLERANCES, *HALF_PRECISION))
        raise VerificationError(f"no tolerance is defined for {dtype}; convert both models to one of {known}")
    return TOLERANCES[dtype][scope]


def _run_in_float64(reference: nn.Module, args: tuple[Any, ...]) -> Any:
    exact = copy.deepcopy(reference).cpu().double().eval()

    def widened(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype)

    with torch.no_grad():
        return exact(*pytree.tree_map_only(Tensor, widened, args))


def distance(expected: Any, got: Any) -> tuple[float, float]:
    """Largest absolute and relative error over the tensors of two outputs."""
    pairs = [_errors(*pair) for pair in _pairs(expected, got)]
    return max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)


def _errors(expected: Tensor, got: Tensor) -> tuple[float, float]:
    expected, got = expected.detach().cpu().double(), got.detach().cpu().double()
    if not (expected.isfinite().all() and got.isfinite().all()):
        return math.inf, math.inf
    absolute, scale = _largest(expected - got), _largest(expected)
    return absolute, absolute / scale if scale else (math.inf if absolute else 0.0)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().amax().item() if tensor.numel() else 0.0


def _pairs(expected: Any, got: Any) -> list[tuple[Tensor, Tensor]]:
    ours, theirs = dict(_tensors(expected)), dict(_tensors(got))
    if len(ours) != len(theirs) or not ours:
        raise VerificationError(
            f"the candidate returns {len(theirs)} tensors and the reference {len(ours)}; "
            "both must return the same number, at least one"
        )
    matched = [theirs[at] for at in ours] if ours.keys() == theirs.keys() else list(theirs.values())
    for (at, tensor), other in zip(ours.items(), matched, strict=True):
        if tensor.shape != other.shape:
            raise VerificationError(
                f"output{at} has shape {tuple(other.shape)} in the candidate and {tuple(tensor.shape)} in the "
                "reference; are both made for the same classes and input size?"
            )
    return list(zip(ours.values(), matched, strict=True))


def _tensors(output: Any, at: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield at, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, f"{at}[{key!r}]")
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for index, value in enumerate(output):
            yield from _tensors(value, f"{at}[{index}]")


def _record_error(
    module: nn.Module, namesake: nn.Module, name: str, errors: dict[str, float], hooks: ExitStack
) -> None:
    """Compare the two at every call of ``module``, until ``hooks`` closes."""
    pending: list[Tensor | None] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        pending.append(args[0].clone() if single else None)  # a copy: the module may work in place

    def compare(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        given = pending.pop()
        error = None if given is None or not isinstance(output, Tensor) else _local_error(namesake, given, output)
        if error is not None:
            errors[name] = max(error, errors.get(name, 0.0))

    if namesake is not module:
        hooks.callback(module.register_forward_pre_hook(remember, with_kwargs=True).remove)
        hooks.callback(module.register_forward_hook(compare).remove)


def _local_error(namesake: nn.Module, given: Tensor, expected: Tensor) -> float | None:
    try:
        got = namesake(given)
    except (RuntimeError, ValueError):  # a part with other shapes in this form: only the block around it compares
        return None
    comparable = isinstance(got, Tensor) and got.shape == expected.shape
    return _errors(expected, got)[1] if comparable else None
