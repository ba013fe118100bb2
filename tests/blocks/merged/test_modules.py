"""What users do to the modules inside a block is seen: hooks, parametrizations, other forwards."""

import warnings

import pytest
import torch
from blocks.claims import BUILDERS
from blocks.merged.cases import METHODS, assert_same_step, block_and_image, in_execution, made, over, row_of, step
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations

import repblocks as rb

over_methods = pytest.mark.parametrize("method", METHODS)


def hooked(kind, module, fired):
    register = {
        "forward": lambda: module.register_forward_hook(lambda *_: fired.append(kind)),
        "forward_pre": lambda: module.register_forward_pre_hook(lambda *_: fired.append(kind)),
        "backward": lambda: module.register_full_backward_hook(lambda *_: fired.append(kind)),
        "backward_pre": lambda: module.register_full_backward_pre_hook(lambda *_: fired.append(kind)),
        "global": lambda: torch_module.register_module_forward_hook(
            lambda called, *_: fired.append(kind) if called is module else None
        ),
        "global_backward": lambda: torch_module.register_module_full_backward_hook(
            lambda called, *_: fired.append(kind) if called is module else None
        ),
    }
    return register[kind]()


@over_methods
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward", "backward_pre", "global", "global_backward"])
@pytest.mark.parametrize("inner", ["kxk0.0", "kxk0.1", "identity", "kxk1"])
@pytest.mark.parametrize("ran_before", [False, True])
def test_hooks_on_inner_modules_fire_and_the_plan_says_so(kind, inner, ran_before, method):
    block, x = block_and_image()
    rb.set_execution(block, method)
    if ran_before:
        block(x)
    fired = []
    handle = hooked(kind, block.branches.get_submodule(inner), fired)
    try:
        row = row_of(block, x)
        block(x).sum().backward()
    finally:
        handle.remove()
    assert fired == [kind]
    assert row.method == "separate"
    assert "hook" in row.reason
    assert row_of(block, x).method == method
    block(x).sum().backward()
    assert fired == [kind]


@over_methods
def test_a_hook_on_the_branches_fires(method):
    block, x = block_and_image()
    rb.set_execution(block, method)
    fired = []
    block.branches.register_forward_hook(lambda *_: fired.append(1))
    block(x)
    assert fired == [1]


@over_methods
def test_hooks_on_the_block_and_on_parameters_do_not_keep_it_from_merging(method):
    block, x = block_and_image()
    rb.set_execution(block, method)
    shapes, gradients = [], []
    block.register_forward_hook(lambda module, given, y: shapes.append(tuple(y.shape)))
    block.register_full_backward_hook(lambda *_: shapes.append("backward"))
    weight = block.branches["kxk0"][0].weight
    weight.register_hook(gradients.append)
    weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad))
    block(x).sum().backward()
    assert shapes == [(3, 6, 6, 7), "backward"]
    assert len(gradients) == 2
    assert torch.equal(*gradients)
    assert row_of(block, x).method == method


@over_methods
@pytest.mark.parametrize(
    "kind", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_weights_leave_the_same(kind, method):
    """Power iterations move their vectors once in a pass, no more."""
    torch.manual_seed(0)
    place = over(6, 6, 1)
    block = made(BUILDERS["mobileone"], place)
    for conv in [module for module in block.modules() if isinstance(module, nn.Conv2d)]:
        kind(conv)
    assert_same_step(block, place.image(), method)
    assert row_of(in_execution(block, method), place.image()).reason


@over_methods
def test_the_older_weight_norm_leaves_the_same(method):
    found = []
    for execution in ("separate", method):
        block, x = block_and_image()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for inner in ("kxk0", "pointwise"):
                nn.utils.weight_norm(block.branches[inner][0])
        rb.set_execution(block, execution)
        found.append(step(block, x))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-9, atol=1e-9)


class Shouting(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Doubled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


@over_methods
def test_modules_that_are_not_what_their_class_says_leave_the_same(method):
    """Put in after construction, which would have refused them."""
    for inner, odd in (("kxk0.1", Shouting(6)), ("kxk1.0", Doubled(6, 6, 3, 1, 1, groups=6, bias=False))):
        block, x = block_and_image()
        block.branches.set_submodule(inner, odd.double())
        assert_same_step(block, x, method)


@over_methods
def test_a_forward_put_on_an_instance_is_called(method):
    for inner in ("kxk0.1", "kxk1.0", "pointwise", "identity"):
        block, x = block_and_image()
        module = block.branches.get_submodule(inner)
        expected = in_execution(block, "separate")
        expected.branches.get_submodule(inner).forward = lambda z: 3.0 * z
        twin = in_execution(block, method)
        twin.branches.get_submodule(inner).forward = lambda z: 3.0 * z
        assert module is not twin.branches.get_submodule(inner)
        torch.testing.assert_close(twin(x), expected(x), rtol=1e-10, atol=1e-10)
