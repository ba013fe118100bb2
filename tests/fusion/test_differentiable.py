"""Folding is part of the graph: gradients reach live parameters, nothing is changed in place, and it compiles."""

import pytest
import torch
from fusion.laws import assert_same
from fusion.modules import conv_norm, prepared
from strategies import randn
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from repblocks.fusion import (
    AffineConv,
    Concat,
    SplitConcat,
    Sum,
    absorb_shortcut,
    add,
    compose,
    concat,
    fold,
    interleave,
    pad_kernel,
    scale,
    split_concat,
    ungroup,
)

SAME, WIDE = ((1, 1), (0, 0)), ((2, 2), (1, 0))

#: Per kernel: its value from four tensors, and their shapes.
KERNELS = {
    "compose": (
        lambda w, b, v, c: compose(
            AffineConv(weight=w, bias=b, stride=(2, 1), dilation=(1, 2), groups=2),
            AffineConv(weight=v, bias=c, dilation=(1, 3)),
        ),
        [(4, 1, 3, 2), (4,), (3, 4, 2, 2), (3,)],
    ),
    "compose with a scale": (
        lambda w, b, g, h: compose(compose(scale(h), AffineConv(weight=w, bias=b)), scale(g)),
        [(4, 2, 1, 3), (4,), (4,), (2,)],
    ),
    "add": (
        lambda w, b, v, c: add(
            AffineConv(weight=w, bias=b, padding=SAME, groups=2),
            AffineConv(weight=v, bias=c, padding=WIDE, dilation=(2, 1)),
        ),
        [(4, 2, 3, 1), (4,), (4, 4, 3, 2), (4,)],
    ),
    "concat": (
        lambda w, b, v, c: concat(
            AffineConv(weight=w, bias=b, padding=SAME, groups=2), AffineConv(weight=v, bias=c).promote(2)
        ),
        [(4, 2, 3, 1), (4,), (3, 4), (3,)],
    ),
    "interleave": (
        lambda w, b, v, c: interleave(
            AffineConv(weight=w, bias=b, padding=SAME, groups=4), AffineConv(weight=v, bias=c, groups=4)
        ),
        [(4, 1, 3, 1), (4,), (4, 1), (4,)],
    ),
    "split_concat": (
        lambda w, b, v, c: split_concat(
            AffineConv(weight=w, bias=b, padding=SAME, groups=2), AffineConv(weight=v, bias=c)
        ),
        [(4, 2, 3, 1), (4,), (2, 3), (2,)],
    ),
    "pad_kernel": (
        lambda w, b, v, c: pad_kernel(AffineConv(weight=w * v, bias=b + c, dilation=(2, 1)), (3, 4)),
        [(2, 2, 2, 1), (2,), (2, 1, 1, 1), (2,)],
    ),
    "ungroup": (
        lambda w, b, v, c: ungroup(AffineConv(weight=w * v, bias=b + c, groups=4), 2),
        [(4, 2, 1, 3), (4,), (4, 1, 1, 1), (4,)],
    ),
    "absorb_shortcut": (
        lambda w, b, v, c: absorb_shortcut(
            [AffineConv(weight=w, bias=b, padding=SAME, groups=2), AffineConv(weight=v, bias=c, padding=SAME)],
            [nn.ReLU()],
        ),
        [(4, 1, 3, 1), (4,), (2, 4, 3, 1), (2,)],
    ),
}


def tensors(shapes) -> list[Tensor]:
    return [randn(seed, *shape).requires_grad_() for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_flow_through_every_kernel(name):
    kernel, shapes = KERNELS[name]
    assert torch.autograd.gradcheck(lambda *given: tuple(pytree.tree_leaves(kernel(*given))), tensors(shapes))


@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_changes_what_it_is_given(name):
    kernel, shapes = KERNELS[name]
    given = tensors(shapes)
    before = [(tensor.detach().clone(), tensor._version) for tensor in given]
    kernel(*given)
    for tensor, (values, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, values)
        assert tensor._version == version


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_takes_batches_of_weights(name):
    kernel, shapes = KERNELS[name]
    given = [tensor.detach() for tensor in tensors(shapes)]
    stacked = [torch.stack([2 * tensor, tensor]) for tensor in given]
    batched = torch.func.vmap(lambda *t: tuple(pytree.tree_leaves(kernel(*t))))(*stacked)
    for one, many in zip(pytree.tree_leaves(kernel(*given)), batched, strict=True):
        assert_same(one, many[1])


def block() -> nn.Module:
    """Every container, pooling, a grouped conv and norms, in float64 and eval mode."""
    branches = {
        "kxk": conv_norm(4, 4, 3, padding=1, groups=2),
        "1x1": conv_norm(4, 4, 1, bias=False),
        "pool": nn.Sequential(nn.AvgPool2d((3, 1), stride=1, padding=(1, 0)), nn.BatchNorm2d(4)),
        "identity": nn.Identity(),
    }
    split = SplitConcat([nn.Conv2d(1, 1, 3), nn.Conv2d(5, 2, 3)], (1, 5))
    module = nn.Sequential(Sum(branches), Concat([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)]), split)
    return prepared(module)


class Folded(nn.Module):
    """Folds its branches whenever it runs: online re-parameterization."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = block()

    def forward(self, x: Tensor) -> Tensor:
        return fold(self.branches)(x)


def test_gradients_flow_through_fold():
    module = Folded()
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = randn(1, 1, 4, 4, 3)

    def output(*given: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, parameters)


def test_training_the_folded_conv_trains_the_branches_as_they_would_train_themselves():
    module, x, target = Folded(), randn(1, 2, 4, 6, 5), randn(2, 2, 3, 4, 3)
    parameters = dict(module.named_parameters())
    folded = torch.autograd.grad((module(x) * target).sum(), list(parameters.values()))
    branched = torch.autograd.grad((module.branches(x) * target).sum(), list(parameters.values()))
    for merged, own in zip(folded, branched, strict=True):
        torch.testing.assert_close(merged, own, rtol=1e-10, atol=1e-10)


def test_backward_through_a_fold_leaves_parameters_and_statistics_as_they_were():
    module = Folded()
    before = {name: (tensor.clone(), tensor._version) for name, tensor in module.state_dict().items()}
    module(randn(1, 2, 4, 6, 5)).sum().backward()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor._version == before[name][1]


def test_a_value_without_gradients_is_made_under_no_grad():
    with torch.no_grad():
        assert not fold(block()).weight.requires_grad
    assert fold(block()).weight.requires_grad


def test_functional_parameters_are_what_is_folded():
    module, x = Folded(), randn(1, 2, 4, 6, 5)
    doubled = {name: 2 * parameter for name, parameter in module.named_parameters()}
    expected = functional_call(module.branches, {k.removeprefix("branches."): v for k, v in doubled.items()}, (x,))
    assert_same(expected.detach(), functional_call(module, doubled, (x,)).detach())


@pytest.mark.slow
def test_a_module_that_folds_in_forward_compiles_without_graph_breaks():
    torch.compiler.reset()
    module, x = Folded(), randn(1, 2, 4, 6, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same(module(x).detach(), compiled(x).detach())
    expected = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    for own, other in zip(expected, torch.autograd.grad(compiled(x).sum(), list(module.parameters())), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_values_go_in_and_out_of_compiled_functions():
    torch.compiler.reset()
    conv = AffineConv(weight=randn(1, 4, 4, 3, 3), bias=randn(2, 4), padding=SAME)
    compiled = torch.compile(lambda a, b: add(a, b), backend="aot_eager", fullgraph=True)
    assert_same(2 * conv.weight, compiled(conv, conv).weight)
