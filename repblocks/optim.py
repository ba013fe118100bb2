"""Gradient re-parameterization: a plain network that trains as if it had the branches of `CSLAConv`."""

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.optim import SGDW  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import SGD, Optimizer

from repblocks.blocks.base import folded
from repblocks.blocks.conv_bn import ConvBN
from repblocks.blocks.copying import copied, in_float64
from repblocks.blocks.csla import CSLAConv
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.fusion import AffineConv, fold
from repblocks.verification import TOLERANCES, distance

Multipliers = Mapping[nn.Parameter, Tensor]
"""What the gradient of a parameter is multiplied by, entry by entry."""

SERVED: tuple[type[Optimizer], ...] = (SGD, SGDW)
"""Optimizers whose step is linear in all gradients so far: timm's ``sgd``, ``momentum``, ``sgdw`` and ``sgdc``."""

_ENTRY = "multiplier"


def gradient_multipliers(branches: nn.Module, in_channels: int | None = None) -> AffineConv:
    """What makes SGD train a folded kernel as it trains the branches: ``m`` times the gradient of each entry.

    Where every parameter p feeds one entry e of the kernel with a constant factor, a step on all p moves e by the step
    times ``m = sum of (de / dp) ** 2``; decay and momentum act on e as they do on the p. The factors are the gradients
    of ``fold(branches).weight.sum()``, and m is what the branches fold to with their factors as parameters.

    Args:
        branches: What `fold` understands, trained by one learning rate and decay; not changed.
        in_channels: Channels of the input, where the branches cannot tell.

    Returns:
        The multipliers in the places of kernel and bias, in float64 on the CPU.

    Raises:
        ConfigurationError: A parameter feeds several entries or another parameter scales it, or a part of the kernel is
            not learned.

    Source: Ding et al. 2022, "Re-parameterizing Your Optimizers", https://arxiv.org/abs/2205.15242, section 3.
    """
    probe = _Probe(branches, in_channels)
    ones = [torch.ones_like(entry) for entry in probe.entries()]
    factors = probe.pull(ones)
    multiplier = probe.value_at(factors)
    _require_one_entry_each(probe, _entries(multiplier))
    return multiplier


class _Probe:
    """A copy of branches in float64, folded at other values of its learned parameters."""

    def __init__(self, branches: nn.Module, in_channels: int | None) -> None:
        self.branches, self.in_channels = copied(branches, _cloned_in_float64).eval(), in_channels
        self.learned = [parameter for parameter in self.branches.parameters() if parameter.requires_grad]
        if not self.learned:
            raise ConfigurationError("the branches have no learned parameter; freeze the plain network instead")

    def entries(self) -> list[Tensor]:
        """Kernel and bias now."""
        return _entries(fold(self.branches, self.in_channels))

    @torch.no_grad()
    def value_at(self, values: Sequence[Tensor]) -> AffineConv:
        """What the branches fold to with these parameters; they keep them."""
        for parameter, value in zip(self.learned, values, strict=True):
            parameter.copy_(value)
        return fold(self.branches, self.in_channels)

    def pull(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the weighted sum of all entries."""
        gradients = torch.autograd.grad(
            self.entries(), self.learned, list(weights), allow_unused=True, materialize_grads=True
        )
        return list(gradients)


def _cloned_in_float64(tensor: Tensor) -> Tensor:
    return in_float64(tensor).clone()


def _entries(value: AffineConv) -> list[Tensor]:
    return [value.weight] if value.bias is None else [value.weight, value.bias]


def _require_one_entry_each(probe: _Probe, multipliers: Sequence[Tensor]) -> None:
    """Check on random numbers that stepping along the gradients moves each entry by its own multiplier alone."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(m.shape, generator=generator, dtype=m.dtype) for m in multipliers]
    factors = probe.pull(noise)
    moved = _entries(probe.value_at(factors))
    elsewhere = probe.pull(noise)
    rest = _entries(probe.value_at([torch.zeros_like(factor) for factor in factors]))
    if not _equal(elsewhere, factors):
        raise _no_multiplier(
            "a factor in front of a parameter is learned too, such as a BatchNorm's or a layer scale's"
        )
    if any(entry.any() for entry in rest):
        raise _no_multiplier("a part of the kernel or bias is constant, and would be decayed with the rest")
    if not _equal(moved, [m * n for m, n in zip(multipliers, noise, strict=True)]):
        raise _no_multiplier("a parameter feeds several entries of the kernel")


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return distance(list(first), list(second))[1] <= TOLERANCES[torch.float64]["block"]


def _no_multiplier(why: str) -> ConfigurationError:
    return ConfigurationError(
        f"no multipliers make one convolution train like these branches: {why}; needed are convolutions and scales of "
        "the input, each times constants, summed: see repblocks.CSLAConv"
    )


def plain_twin(model: nn.Module) -> tuple[nn.Module, dict[nn.Parameter, Tensor]]:
    """The plain network that a model of `CSLAConv` blocks is, and the multipliers with which it trains like that.

    Each block becomes a `ConvBN` that starts with its folded kernel and its BatchNorm. A model of the zoo with
    ``block="csla"`` becomes the one with ``block="plain"``.

    Args:
        model: In train form; not changed.

    Returns:
        The plain copy, and the multipliers of its kernels.

    Raises:
        ConfigurationError: No block is a `CSLAConv`, or one is in deploy form or not learned as a whole.
    """
    blocks = [module for module in model.modules() if isinstance(module, CSLAConv)]
    if not blocks:
        raise ConfigurationError(
            f"{type(model).__name__} has no CSLAConv whose gradients could be re-parameterized; build it with "
            'block="csla" (+model.args.block=csla on the command line)'
        )
    twins = {id(block): _plain_block(block) for block in blocks}
    plain = copy.deepcopy(model, {key: twin for key, (twin, _) in twins.items()})
    args: dict[str, Any] = vars(plain).get("model_args", {})
    if args.get("block") == "csla":
        vars(plain)["model_args"] = {**args, "block": "plain"}
    return plain, {_kernel(twin): multiplier for twin, multiplier in twins.values()}


def _plain_block(block: CSLAConv) -> tuple[ConvBN, Tensor]:
    if block.form == "deploy":
        raise ConfigurationError("a CSLAConv is in deploy form, whose branches are gone; convert the model before that")
    assert isinstance(block.branches, nn.Sequential)
    branches, norm = block.branches
    value, multiplier = folded(branches).promote(2), gradient_multipliers(branches).promote(2)
    plain, like = _conv_bn(value), next(branches.parameters())
    assert isinstance(plain.branches, nn.Sequential)
    plain.branches[0].weight = nn.Parameter(value.weight.detach().to(like, copy=True))
    plain.branches[1] = copy.deepcopy(norm)
    return plain.train(block.training), multiplier.weight.to(like)


def _conv_bn(value: AffineConv) -> ConvBN:
    """The block around a kernel, without its numbers."""
    (height, width), (vertical, horizontal) = value.kernel_size, value.padding
    with torch.device("meta"):
        return ConvBN(
            value.in_channels,
            value.out_channels,
            (height, width),
            stride=(value.stride[0], value.stride[1]),
            padding=(vertical, horizontal),
            dilation=(value.dilation[0], value.dilation[1]),
            groups=value.groups,
            padding_mode=value.padding_mode,
        )


def _kernel(block: ConvBN) -> nn.Parameter:
    return block.get_parameter("branches.0.weight")


class RepOptimizer(Optimizer):
    """SGD that multiplies gradients first, so that a plain network trains as its branches would.

    With the multipliers of `plain_twin`, kernels stay equal to the folded kernels of the `CSLAConv` blocks, trained by
    the same optimizer with one learning rate and one weight decay for all branches of a block: momentum, dampening,
    Nesterov's momentum and weight decay included, for the multipliers come before them. Biases and BatchNorms that
    `plain_twin` leaves alone have no multiplier.

    The multipliers stand in the state of their parameter, so ``state_dict`` carries them, and loading takes those of
    the file. Learning rates are read from ``param_groups``, which are those of the given optimizer, at every step.

    Gradients must reach ``step`` as the backward pass left them, but for what ``GradScaler`` does: clipping by the norm
    of gradients without their multipliers is another training. `accept_gradients` allows other changes, such as an
    average over processes; changes through ``.data`` are not seen.

    Args:
        optimizer: ``torch.optim.SGD`` or timm's ``SGDW``, over the plain network; it is stepped by this one only.
        multipliers: Of some of its parameters, each of its parameter's shape.

    Raises:
        ConfigurationError: Another optimizer, whose step is not linear in the gradient, so that no multiplier makes
            both trainings equal: Adam and its kin, LARS, SGDP, cautious ones. Or multipliers of other parameters or of
            another shape.

    Source: Ding et al. 2022, "Re-parameterizing Your Optimizers", https://arxiv.org/abs/2205.15242, section 3.
    """

    base: Optimizer

    def __init__(self, optimizer: Optimizer, multipliers: Multipliers) -> None:
        _require_linear(optimizer)
        parameters = list(_parameters(optimizer))
        _require_fit(multipliers, parameters)
        super().__init__(parameters, optimizer.defaults)
        self.base, self.state, self.param_groups = optimizer, optimizer.state, optimizer.param_groups
        for parameter, multiplier in multipliers.items():
            self.state[parameter][_ENTRY] = multiplier.detach().to(parameter)
        self._unchanged = _Unchanged(self._multipliers)

    @classmethod
    def for_plain(cls, model: nn.Module, make: Callable[[nn.Module], Optimizer]) -> tuple[nn.Module, "RepOptimizer"]:
        """The `plain_twin` of a model of `CSLAConv` blocks, and the optimizer that ``make(twin)`` gives, multiplying.

        ``plain, optimizer = RepOptimizer.for_plain(model, lambda plain: torch.optim.SGD(plain.parameters(), lr=0.1))``

        Raises:
            ConfigurationError: As in `plain_twin` and `RepOptimizer`.
        """
        plain, multipliers = plain_twin(model)
        return plain, cls(make(plain), multipliers)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Multiply, step, and leave the gradients as they were.

        Args:
            closure: Computes the loss and its gradients again, and returns the loss.

        Raises:
            ConfigurationError: Gradients changed since the backward pass.
        """
        with torch.enable_grad():
            loss = closure() if closure else None
        self._unchanged.require()
        with _multiplied(self._multipliers):
            self.base.step()
        self._unchanged.forget()
        return loss

    def accept_gradients(self) -> None:
        """Let the next ``step`` take the gradients as they are now, changed on purpose since the backward pass."""
        self._unchanged.forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state over, with its multipliers.

        Raises:
            CheckpointError: It has none for a parameter that has one here: it is that of an ordinary optimizer.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        pairs = zip(_parameters(self), saved, strict=False)  # where their number differs, torch says so
        states = state_dict["state"]
        lost = [index for p, index in pairs if p in self._multipliers and _ENTRY not in states.get(index, {})]
        if lost:
            raise CheckpointError(
                f"the optimizer's state has no multipliers for {len(lost)} parameters that are trained by them; it is "
                "the state of an ordinary optimizer: load that of a RepOptimizer"
            )
        self._unchanged.close()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._unchanged = _Unchanged(self._multipliers)

    @property
    def _multipliers(self) -> dict[nn.Parameter, Tensor]:
        states = [(parameter, self.state.get(parameter, {})) for parameter in _parameters(self)]
        return {parameter: state[_ENTRY] for parameter, state in states if _ENTRY in state}


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _require_linear(optimizer: Optimizer) -> None:
    cautious = any(group.get("caution") for group in optimizer.param_groups)
    if type(optimizer) not in SERVED or cautious:
        raise ConfigurationError(
            f"got {'a cautious ' if cautious else ''}{type(optimizer).__name__}, whose step is not linear in the "
            "gradient: no multiplier makes it train a kernel as it trains branches (Adam divides the multiplier "
            "out again); use torch.optim.SGD, or sgd, momentum or sgdw of timm, or train the CSLAConv blocks"
        )


def _require_fit(multipliers: Multipliers, parameters: Iterable[nn.Parameter]) -> None:
    shapes = {id(parameter): parameter.shape for parameter in parameters}
    for parameter, multiplier in multipliers.items():
        if shapes.get(id(parameter)) != multiplier.shape:
            raise ConfigurationError(
                f"got a multiplier {tuple(multiplier.shape)} for a parameter {tuple(parameter.shape)}"
                f"{'' if id(parameter) in shapes else ', which the optimizer does not train'}; needed one of the same "
                "shape for a parameter of the optimizer: make it over the parameters of the plain twin"
            )


@contextmanager
def _multiplied(multipliers: Multipliers) -> Generator[None]:
    gradients = {parameter: parameter.grad for parameter in multipliers}
    try:
        for parameter, gradient in gradients.items():
            parameter.grad = None if gradient is None else gradient * multipliers[parameter]
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


class _Unchanged:
    """Whether gradients are as the last backward pass left them, judged by their memory and torch's count of changes.

    Args:
        parameters: Whose gradients are watched.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.marks: dict[int, tuple[int, int]] = {}
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_mark_later, self.marks, index))
            for index, parameter in enumerate(self.parameters)
        ]

    def require(self) -> None:
        """Do nothing if they are, or come from no backward pass.

        Raises:
            ConfigurationError: Some are not.
        """
        changed = [i for i, mark in self.marks.items() if _mark(self.parameters[i]) not in (mark, None)]
        if changed:
            raise ConfigurationError(
                f"{len(changed)} gradients changed between the backward pass and the step; their multipliers apply to "
                "the gradients of the loss, and a norm without the multipliers is not that of the branches: leave "
                "clipping out, or call accept_gradients() before step() after a change that is linear"
            )

    def forget(self) -> None:
        """Judge nothing until the next backward pass."""
        self.marks.clear()

    def close(self) -> None:
        """Stop watching."""
        for hook in self.hooks:
            hook.remove()


def _mark(parameter: Tensor) -> tuple[int, int] | None:
    gradient = parameter.grad
    return None if gradient is None else (gradient.data_ptr(), gradient._version)


def _mark_later(marks: dict[int, tuple[int, int]], index: int, parameter: Tensor) -> None:
    """Mark a gradient when the backward pass is over, and after what others do then: DDP's average over processes."""

    def mark() -> None:
        found = _mark(parameter)
        if found is not None:
            marks[index] = found

    # A callback that is queued by a callback runs behind all that were queued by hooks, as DDP's is.
    engine = Variable._execution_engine  # pyright: ignore[reportPrivateUsage]  # as torch's FSDP does
    engine.queue_callback(partial(engine.queue_callback, mark))
