"""What a model costs: parameters, multiply-accumulates, bytes of weights, milliseconds."""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from repblocks.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The cost of one model.

    Attributes:
        params: Learned numbers; shared ones count once.
        macs: Multiply-accumulates of matrix products and convolutions for one image.
        weight_bytes: Parameters and buffers in memory.
    """

    params: int
    macs: int
    weight_bytes: int

    def to_dict(self) -> dict[str, int]:
        """The fields, for JSON."""
        return asdict(self)


def profile(model: nn.Module, input_size: tuple[int, ...]) -> Profile:
    """Count parameters, MACs and bytes of a model in eval mode. The model is not touched.

    MACs are half the FLOPs that torch counts in a forward pass of a copy, on the model's device.

    Args:
        model: Any module that takes one tensor.
        input_size: ``(channels, height, width)`` of one image, without the batch axis.
    """
    images = torch.zeros(1, *input_size, **first_parameter_options(model))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(model).eval()(images)
    return Profile(
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        weight_bytes=sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors),
    )


class OpCounts(NamedTuple):
    """Layers that one forward pass runs, as modules or as functions.

    Attributes:
        convs: Convolutions, transposed ones too; a weight that is used twice counts twice.
        norms: BatchNorms.
    """

    convs: int
    norms: int


def count_ops(model: nn.Module, inputs: Tensor | tuple[Any, ...]) -> OpCounts:
    """Count the convolutions and BatchNorms that run in a forward pass in eval mode. The model is not touched.

    Args:
        model: Any module.
        inputs: A tensor, or a tuple of the model's arguments.
    """
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    recorder = _Recorder()
    twin = copy.deepcopy(model).eval()
    with torch.no_grad(), recorder:
        twin(*args)
    return OpCounts(
        convs=sum(count for name, count in recorder.calls.items() if "convolution" in name),
        norms=sum(count for name, count in recorder.calls.items() if "batch_norm" in name),
    )


class _Recorder(TorchDispatchMode):
    """Counts the operations that torch dispatches, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def latency_ms(
    runs: Mapping[str, Callable[[Tensor], Any]], inputs: Tensor, *, repeats: int = 30, warmup: int = 5
) -> dict[str, float]:
    """Median time of each callable on the same inputs, in milliseconds.

    The callables take turns, in an order that reverses every round, and torch uses one thread: on a busy machine
    the ratios stay meaningful where the absolute numbers do not.

    Args:
        runs: Models in eval mode, or functions (a runtime that executes an exported file), by name.
        inputs: Given to each of them.
        repeats: Rounds measured.
        warmup: Rounds before those, not measured.

    Raises:
        ConfigurationError: A model is in train mode, or ``repeats`` is not positive.
    """
    _check_runs(runs, repeats)
    times: dict[str, list[float]] = {name: [] for name in runs}
    with _one_thread(), torch.no_grad():
        for turn in range(warmup + repeats):
            for name in runs if turn % 2 else reversed(list(runs)):
                elapsed = _elapsed_ms(runs[name], inputs)
                times[name] += [elapsed] if turn >= warmup else []
    return {name: statistics.median(values) for name, values in times.items()}


def first_parameter_options(model: nn.Module) -> dict[str, Any]:
    """The dtype and device that a model computes in, as arguments for its inputs."""
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    return {} if first is None else {"dtype": first.dtype, "device": first.device}


def _check_runs(runs: Mapping[str, Callable[[Tensor], Any]], repeats: int) -> None:
    training = [name for name, run in runs.items() if isinstance(run, nn.Module) and run.training]
    if training:
        raise ConfigurationError(
            f"cannot measure {training[0]!r} in train mode: it would change; call eval() on it first"
        )
    if repeats < 1:
        raise ConfigurationError(f"got repeats={repeats}; at least one measured round is needed")


@contextmanager
def _one_thread() -> Generator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _elapsed_ms(run: Callable[[Tensor], Any], inputs: Tensor) -> float:
    _wait_for(inputs.device)
    start = time.perf_counter()
    run(inputs)
    _wait_for(inputs.device)
    return 1e3 * (time.perf_counter() - start)


def _wait_for(device: torch.device) -> None:
    """GPUs work asynchronously: without this only the launch is timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
