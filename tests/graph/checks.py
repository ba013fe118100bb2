"""What a collapse must never do: change the function, the model it was given, or the numbers of others."""

import copy

import torch
from strategies import randn
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from repblocks.graph.collapse import Collapsed, collapse
from repblocks.verification import TOLERANCES


class OperatorCounts(TorchDispatchMode):
    """Count the convolutions, matrix products and batch norms that torch executes, however they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = self.norms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.convs += name in ("convolution", "addmm", "mm", "bmm", "baddbmm", "linear")
        self.norms += "batch_norm" in name
        return func(*args, **(kwargs or {}))


def count_operators(model: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    with torch.no_grad(), OperatorCounts() as counts:
        run(model, *inputs)
    return counts.convs, counts.norms


def cost(model: nn.Module, *inputs) -> tuple[int, int]:
    """Multiply-accumulates of these inputs, and parameters."""
    counter = FlopCounterMode(display=False)
    with counter:
        run(model, *inputs)
    return counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters())


def run(model: nn.Module, *inputs):
    """Call a model with its own copies of the inputs."""
    with torch.no_grad():
        return model(*copy.deepcopy(inputs))


def assert_same_outputs(expected, got) -> None:
    expected_tree, got_tree = pytree.tree_flatten(expected), pytree.tree_flatten(got)
    assert expected_tree[1] == got_tree[1]
    for a, b in zip(expected_tree[0], got_tree[0], strict=True):
        if not isinstance(a, Tensor):
            assert a == b
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.is_floating_point():
            tolerance = TOLERANCES[a.dtype]["model"] if a.dtype in TOLERANCES else 0.0
            assert (a - b).abs().max() <= tolerance * a.abs().max()
        else:
            assert torch.equal(a, b)


def snapshot(model: nn.Module):
    """All that the modules hold, tensors by identity and by value, so that a change of any kind shows."""
    held = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            held[name, key] = copy.copy(value) if isinstance(value, dict | list | set) else value
    return held, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before) -> None:
    held, numbers = snapshot(model)
    assert held.keys() == before[0].keys()
    for key, value in held.items():
        assert _same(value, before[0][key]), key
    assert numbers.keys() == before[1].keys()
    real = {name: tensor for name, tensor in numbers.items() if not tensor.is_meta}
    assert all(_equal_with_nan(tensor, before[1][name]) for name, tensor in real.items())


def _equal_with_nan(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _same(value, earlier) -> bool:
    if isinstance(value, dict) and isinstance(earlier, dict):
        return list(value) == list(earlier) and all(_same(value[key], earlier[key]) for key in value)
    if value is earlier or isinstance(value, nn.Parameter) or isinstance(earlier, nn.Parameter):
        return value is earlier
    if isinstance(value, Tensor) and isinstance(earlier, Tensor):
        return torch.equal(value, earlier)
    return bool(value == earlier)


def collapse_unbroken(model: nn.Module, *inputs, others=(), fresh=lambda model: model, **options) -> Collapsed:
    """Collapse, and check the function, the model given, its inputs, and that a second collapse finds nothing.

    Models that keep state are compared from a ``fresh`` start, such as a copy, for every input.
    """
    given, before, random_state = copy.deepcopy(inputs), snapshot(model), torch.get_rng_state()
    outcome = collapse(model, inputs[0] if len(inputs) == 1 else inputs, **options)
    assert_unchanged(model, before)
    assert all(map(torch.equal, pytree.tree_leaves(inputs), pytree.tree_leaves(given)))
    assert torch.equal(random_state, torch.get_rng_state())
    for case in (inputs, *others):
        assert_same_outputs(run(fresh(model), *case), run(fresh(outcome.model), *case))
    assert all(row.error is None or row.error <= max(_tolerances_of(model)) for row in outcome.report.regions)
    _assert_settled(outcome.model, *inputs, **options)
    return outcome


def _tolerances_of(model: nn.Module) -> list[float]:
    dtypes = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    return [TOLERANCES[dtype]["model"] for dtype in dtypes & TOLERANCES.keys()]


def _assert_settled(result: nn.Module, *inputs, **options) -> None:
    again = collapse(result, inputs[0] if len(inputs) == 1 else inputs, **options)
    assert not again.report.regions
    assert list(again.model.state_dict()) == list(result.state_dict())


def pictures(count=3, size=(13, 17), seed=0):
    return randn(seed, count, 8, *size)
