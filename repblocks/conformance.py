"""What every block promises, checked on one block and its input: the suite of the zoo, for blocks of your own."""

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.layers import DropPath  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from repblocks.blocks.base import RepConv, deployed, form_of, switch_to_deploy
from repblocks.calibration import batch_norms, calibrate
from repblocks.errors import VerificationError
from repblocks.verification import HALF_PRECISION, HALF_PRECISION_FACTOR, TOLERANCES, Scope

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FEW_IMAGES = 3
"""What is looked at where all images would tell the same."""
Check = Callable[[nn.Module, Tensor], str | None]
_LEFTOVERS = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormError:
    """How far the deploy form is from the train form in one dtype, relative to the largest output.

    Attributes:
        dtype: Such as ``"float32"``.
        border: Largest error over outputs that read padding; in half precision, like ``interior`` and ``tolerance``,
            relative to the block in float64.
        interior: Largest error over the others.
        tolerance: What counts as equal.
    """

    dtype: str
    border: float
    interior: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether both count as equal."""
        return max(self.border, self.interior) <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """What `check_block` found.

    Attributes:
        name: Class of the block.
        errors: One row per dtype.
        promises: Every other promise, and what broke it; None where it holds.
    """

    name: str
    errors: tuple[FormError, ...]
    promises: Mapping[str, str | None]

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return all(error.passed for error in self.errors) and not any(self.promises.values())

    def raise_if_failed(self) -> None:
        """Do nothing if everything holds.

        Raises:
            VerificationError: Something does not; the message is the report.
        """
        if not self.passed:
            raise VerificationError(
                f"{self}\nlook at the fold rules of its branches: rb.fold(branch)(x) must be branch(x)"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields and ``passed``, for JSON."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        rows = [f"  {'deploy form equals eval form':<34}{'border':>9}{'interior':>10}{'at most':>10}"]
        rows += [
            f"  {_mark(e.passed)} {e.dtype:<31}{e.border:>9.1e}{e.interior:>10.1e}{e.tolerance:>10.1e}"
            for e in self.errors
        ]
        rows += [f"  {_mark(not why)} {what}{f': {why}' if why else ''}" for what, why in self.promises.items()]
        return "\n".join([f"{self.name}: {'conforms' if self.passed else 'does not conform'}", *rows])


def check_block(block: nn.Module, images: Tensor, *, scope: Scope = "block") -> BlockReport:
    """Check what every block of the zoo promises: exact collapse in four dtypes, and its manners as a module.

    Copies of the block are checked, with random BatchNorm statistics around those of ``images``; the block is not
    changed. Its weights stay, but for those that start at 0 or 1.

    Args:
        block: In train form: a `RepConv`, a `RepBlock`, or a module that holds some.
        images: ``[N, C, H, W]``, best with an odd N and H other than W.
        scope: Column of the table of tolerances.

    Returns:
        The report; print it, or call its ``raise_if_failed`` in a test.

    Raises:
        VerificationError: The block is in deploy form already.
        FoldError: The block does not fold.
    """
    if form_of(block) == "deploy":
        raise VerificationError(f"{type(block).__name__} is in deploy form; check it before switch_to_deploy")
    images = images.detach().cpu().double()
    exact = calibrate(copy.deepcopy(block).cpu().double(), images)
    return BlockReport(
        name=type(block).__name__,
        errors=tuple(form_error(exact, images, dtype, scope=scope) for dtype in DTYPES),
        promises={what: _broken(check, exact, images) for what, check in PROMISES.items()},
    )


@torch.no_grad()
def form_error(exact: nn.Module, images: Tensor, dtype: torch.dtype, *, scope: Scope = "block") -> FormError:
    """The deploy form's error in one dtype, at the border and inside, of a block in float64 and in eval mode."""
    block, x = copy.deepcopy(exact).to(dtype), images.to(dtype)
    train, deploy = (form(x).double() for form in (block, deployed(block)))
    if dtype in HALF_PRECISION:
        reference = block.double()(x.double())
        tolerance = HALF_PRECISION_FACTOR * _relative(train - reference, reference)
    else:
        reference, tolerance = train, TOLERANCES[dtype][scope]
    border = border_of(exact, images.shape[-2:], reference)
    error = deploy - reference
    return FormError(
        dtype=str(dtype).removeprefix("torch."),
        border=_relative(error.where(border, 0.0), reference),
        interior=_relative(error.where(~border, 0.0), reference),
        tolerance=tolerance,
    )


def border_of(block: nn.Module, input_size: tuple[int, ...], output: Tensor) -> Tensor:
    """Where a block's output reads padding, as a mask ``[H, W]``; the outermost pixels of one that is not linear."""
    if output.ndim != 4:
        return torch.zeros((), dtype=torch.bool)
    if not isinstance(block, RepConv):
        inside = torch.zeros(output.shape[-2:], dtype=torch.bool)
        inside[1:-1, 1:-1] = True
        return ~inside
    rows, columns = (_reads_padding(block, dim, input_size[dim], output.shape[2 + dim]) for dim in (0, 1))
    return rows[:, None] | columns


def _reads_padding(block: RepConv, dim: int, size: int, count: int) -> Tensor:
    first = torch.arange(count) * block.stride[dim] - block.padding[dim][0]
    last = first + block.dilation[dim] * (block.kernel_size[dim] - 1)
    return (first < 0) | (last >= size)


def _relative(error: Tensor, reference: Tensor) -> float:
    scale = reference.abs().max().item()
    return error.abs().max().item() / scale if scale else float("inf")


def _mark(holds: bool) -> str:  # noqa: FBT001 - what it marks
    return "ok  " if holds else "FAIL"


def _broken(check: Check, exact: nn.Module, images: Tensor) -> str | None:
    return check(copy.deepcopy(exact), images)


def _on_few_images(check: Check) -> Check:
    """A check without gradients, on the first images: in eval mode each of them is computed by itself."""

    @torch.no_grad()
    def of_few(block: nn.Module, x: Tensor) -> str | None:
        return check(block, x[:FEW_IMAGES])

    return of_few


def _gradients(block: nn.Module, x: Tensor) -> str | None:
    parameters = {name: p for name, p in block.named_parameters() if p.requires_grad}
    block.train()(x).square().sum().backward()
    missed = [name for name, p in parameters.items() if p.grad is None]
    # By the statistics of a batch, BatchNorm cancels every bias in front of it: in training mode its gradient is 0.
    block.eval()(x[:FEW_IMAGES]).square().sum().backward()
    missed += [name for name, p in parameters.items() if p.grad is not None and not p.grad.any()]
    return f"none for {', '.join(missed)}" if missed else None


def _leftovers(block: nn.Module, x: Tensor) -> str | None:
    deploy = deployed(block)
    left = [*batch_norms(deploy), *(module for module in deploy.modules() if isinstance(module, _LEFTOVERS))]
    left += [m for m in deploy.modules() if isinstance(m, nn.Sequential | nn.ModuleDict | nn.ModuleList) and not len(m)]
    return f"left: {', '.join(sorted({type(module).__name__ for module in left}))}" if left else None


@_on_few_images
def _round_trips(block: nn.Module, x: Tensor) -> str | None:
    for form in (block, deployed(block)):
        other = copy.deepcopy(form)
        for tensor in other.state_dict().values():
            tensor.zero_()
        other.load_state_dict(form.state_dict())
        if not torch.equal(other(x), form(x)):
            return f"the {form_of(form)} form computes something else with its own weights"
    return None


@_on_few_images
def _switches_once(block: nn.Module, x: Tensor) -> str | None:
    switch_to_deploy(block)
    once = {key: tensor.clone() for key, tensor in block.state_dict().items()}
    switch_to_deploy(block)
    twice = block.state_dict()
    same = once.keys() == twice.keys() and all(torch.equal(once[key], twice[key]) for key in once)
    return None if same else "the second switch changed weights"


@_on_few_images
def _leaves_the_model_alone(block: nn.Module, x: Tensor) -> str | None:
    before = block(x)
    deployed(block)
    return None if torch.equal(block(x), before) else "deployed() changed the block it was given"


@_on_few_images
def _copies(block: nn.Module, x: Tensor) -> str | None:
    for form in (block, deployed(block)):
        try:
            twins = copy.deepcopy(form), pickle.loads(pickle.dumps(form))
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            return f"the {form_of(form)} form does not pickle: {error}"
        expected = form(x)
        if not all(torch.equal(twin(x), expected) for twin in twins):
            return f"a copy of the {form_of(form)} form computes something else"
    return None


@_on_few_images
def _channels_last(block: nn.Module, x: Tensor) -> str | None:
    for form in (block, deployed(block)):
        expected = form(x)
        error = _relative(form(x.to(memory_format=torch.channels_last)) - expected, expected)
        if error > TOLERANCES[torch.float64]["model"]:
            return f"the {form_of(form)} form differs by {error:.1e}"
    return None


PROMISES: Mapping[str, Check] = {
    "gradients reach every parameter": _gradients,
    "no BatchNorm or other leftover in deploy form": _leftovers,
    "weights of either form load again": _round_trips,
    "switching twice is switching once": _switches_once,
    "collapsing a copy leaves the block alone": _leaves_the_model_alone,
    "copies and pickles compute the same": _copies,
    "channels_last images give the same": _channels_last,
}
