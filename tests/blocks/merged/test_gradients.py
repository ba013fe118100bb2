"""Autograd's other uses of a block: gradcheck, several passes, checkpointing, functorch, saved tensors."""

import gc
import weakref

import pytest
import torch
from blocks.claims import BUILDERS
from blocks.merged.cases import (
    METHODS,
    SMALL,
    assert_same_step,
    cotangent,
    differences,
    image,
    in_execution,
    left_by,
    made,
    over,
    saved_bytes,
    scales,
    small_block,
    stepped,
    training,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import repblocks as rb

over_methods = pytest.mark.parametrize("method", METHODS)
over_places = pytest.mark.parametrize("place", SMALL)
over_executions = pytest.mark.parametrize("execution", ["separate", *METHODS])


def assert_same_as_separate(place, method, run, name="mobileone"):
    """``run(block, x)`` gives the output; what it leaves is what it leaves with separate branches."""
    left = {}
    for execution in ("separate", method):
        block, x = small_block(place, execution, name)
        leaf = x.detach().requires_grad_()
        y = run(block, leaf)
        left[execution] = {"output": y.detach()} | left_by(block, leaf)
    block, x = small_block(place, "separate", name)
    scale = scales(block, x, stepped(block, x, "separate"))
    wrong = differences(left[method], left["separate"], {key: 10 * scale[key] for key in left["separate"]})
    assert not wrong, wrong


@over_methods
@over_places
def test_two_backward_passes_through_a_retained_graph_add_up(place, method):
    def run(block, x):
        y = block(x)
        y.backward(cotangent(y), retain_graph=True)
        y.backward(0.5 * cotangent(y))
        return y

    assert_same_as_separate(place, method, run)


@over_methods
@over_places
def test_a_second_backward_pass_without_a_retained_graph_is_refused(place, method):
    block, x = small_block(place, method)
    y = block(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@over_methods
@over_places
def test_gradients_accumulate_over_passes(place, method):
    def run(block, x):
        for factor in (1.0, -0.5, 2.0):
            y = block(factor * x)
            y.backward(cotangent(y))
        return y

    assert_same_as_separate(place, method, run)


@over_methods
@over_places
def test_backward_passes_may_come_in_any_order(place, method):
    """Two forward passes before the first backward: neither sees what the other keeps."""

    def run(block, x):
        first, second = block(x), block(x * x - 1)
        second.backward(cotangent(second))
        first.backward(cotangent(first))
        return first

    assert_same_as_separate(place, method, run)


@over_methods
@over_places
@pytest.mark.parametrize("form", ["sum", "mean", "channels_last", "strided", "expanded"])
def test_gradients_of_any_layout_arrive(place, form, method):
    def run(block, x):
        y = block(x)
        given = cotangent(y)
        layouts = {
            "sum": lambda: torch.ones((), dtype=y.dtype).expand(y.shape),
            "mean": lambda: torch.full((), 1 / y.numel(), dtype=y.dtype).expand(y.shape),
            "channels_last": lambda: given.contiguous(memory_format=torch.channels_last),
            "strided": lambda: torch.stack([given, given], -1)[..., 0],
            "expanded": lambda: given[:1].expand(y.shape),
        }
        y.backward(layouts[form]())
        return y

    assert_same_as_separate(place, method, run)


@over_methods
@over_places
@pytest.mark.parametrize("form", ["transposed", "strided", "expanded", "sliced", "negative_view"])
def test_inputs_of_any_layout_are_read(place, form, method):
    def run(block, x):
        layouts = {
            "transposed": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
            "strided": lambda: torch.stack([x, -x], -1)[..., 0],
            "expanded": lambda: x[:1, :, :, :1].expand_as(x),
            "sliced": lambda: torch.cat([x, x], 1)[:, x.shape[1] :],
            "negative_view": lambda: x.flip(3),
        }
        y = block(layouts[form]())
        y.backward(cotangent(y))
        return y

    assert_same_as_separate(place, method, run)


@over_methods
@over_places
def test_an_activation_in_place_may_follow(place, method):
    def run(block, x):
        y = torch.relu_(block(1.0 * x))
        y.backward(cotangent(y))
        return y

    assert_same_as_separate(place, method, run)


@over_executions
@over_places
def test_an_input_changed_before_backward_is_refused(place, execution):
    block, x = small_block(place, execution)
    changed = 1.0 * x
    y = block(changed)
    changed.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@over_executions
@over_places
def test_weights_changed_before_backward_are_refused(place, execution):
    block, x = small_block(place, execution)
    y = block(x)
    with torch.no_grad():
        block.branches["kxk0"][0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@over_methods
@over_places
def test_gradients_of_some_parameters_only(place, method):
    wanted = ["branches.kxk1.0.weight", "branches.kxk0.1.bias"]
    found = []
    for execution in ("separate", method):
        block, x = small_block(place, execution)
        y = block(x)
        found.append(torch.autograd.grad(y, [block.get_parameter(name) for name in wanted], cotangent(y)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@over_methods
@over_places
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(place, reentrant, method):
    def run(block, x):
        y = checkpoint(block, x, use_reentrant=reentrant)
        y.backward(cotangent(y))
        return y

    assert_same_as_separate(place, method, run)


@over_methods
@over_places
def test_offloaded_activations_give_the_same_gradients(place, method):
    def run(block, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone().numpy(force=True), torch.from_numpy):
            y = block(x)
        y.backward(cotangent(y))
        return y

    assert_same_as_separate(place, method, run)


@over_methods
@pytest.mark.parametrize("name", ["mobileone", "repvgg", "repvit", "acb", "qarepvgg", "dbb", "repunit"])
@pytest.mark.parametrize("shape", [(6, 6, 1, 1), (6, 6, 3, 6), (6, 6, 3, 1)])
def test_merged_execution_keeps_no_more_for_backward(name, shape, method):
    *sizes, groups = shape
    block = training(BUILDERS[name](*sizes, groups=groups))
    x = image(4, 6, 16, 18, channels_last=True)
    assert saved_bytes(in_execution(block, method), x) <= saved_bytes(in_execution(block, "separate"), x)


@over_methods
@pytest.mark.parametrize("shape", [(6, 6, 1, 1), (6, 6, 3, 6)])
def test_merged_patches_keep_the_input_only(shape, method):
    *sizes, groups = shape
    x = image(4, 6, 32, 32, channels_last=True)
    block = in_execution(training(BUILDERS["mobileone"](*sizes, groups=groups)), method)
    maps = saved_bytes(block, x) / (x.numel() * 8)
    assert maps <= (1.2 if method == "patches" else 5.2)


@over_methods
@over_places
def test_nothing_outlives_the_output(place, method):
    """No cycle holds the activations until the garbage collector comes by."""
    block, x = small_block(place, method)
    inner = 1.0 * x
    alive = weakref.ref(inner)
    gc.collect()
    gc.disable()
    try:
        y = block(inner)
        y.sum().backward()
        del inner, y
        assert alive() is None
    finally:
        gc.enable()


@over_methods
@over_places
def test_a_forward_pass_without_gradients_moves_the_statistics(place, method):
    for context in (torch.no_grad, torch.inference_mode):
        left = {}
        for execution in ("separate", method):
            block, x = small_block(place, execution)
            with context():
                y = block(x)
            assert not y.requires_grad
            left[execution] = {"output": y.clone()} | {name: b.clone() for name, b in block.named_buffers()}
        for name, expected in left["separate"].items():
            torch.testing.assert_close(left[method][name], expected, rtol=1e-10, atol=1e-12)


@over_methods
def test_a_block_used_twice_in_one_pass(method):
    place = over(4, 4, 3, groups=4)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = made(BUILDERS["mobileone"], place)

        def forward(self, x):
            return self.block(torch.tanh(self.block(x)))

    assert_same_step(Twice().train(), place.image(), method)


@over_methods
def test_the_layout_of_the_input_is_kept(method):
    for place in (over(6, 6, 1), over(6, 6, 3, groups=6), over(4, 6, 3), over(3, 8, 3, stride=2)):
        block = in_execution(made(BUILDERS["mobileone"], place), method)
        x = place.image().detach().contiguous(memory_format=torch.channels_last)
        assert block(x).is_contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(block(x).square().sum(), x)
        assert gradient.shape == x.shape


@over_methods
def test_runs_repeat_bit_by_bit(method):
    for place in ("dense", "pointwise", "depthwise", "depthwise_stride_2"):
        first, second = (stepped(*small_block(place, method), method) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_meta_tensors_pass_through():
    for execution in ("auto", "separate", "merged", *METHODS):
        block = in_execution(rb.MobileOneConv(4, 4).train(), execution).to("meta")
        assert block(torch.empty(2, 4, 5, 6, device="meta")).shape == (2, 4, 5, 6)
