"""Choosing an execution changes nothing but how a block runs; the plan tells what runs."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from blocks.claims import BUILDERS
from blocks.merged.cases import (
    EXACT,
    METHODS,
    assert_same_step,
    block_and_image,
    image,
    in_execution,
    largest,
    method_of,
    over,
    row_of,
    small_net,
    step,
)
from support import batch_norms
from torch import nn

import repblocks as rb

EXECUTIONS = ("auto", "separate", "merged", *METHODS)
over_methods = pytest.mark.parametrize("method", METHODS)
every_block = pytest.mark.parametrize("name", sorted(rb.BLOCKS))
PLACE = over(6, 6, 3, size=(6, 7))
DEPTHWISE = over(6, 6, 3, groups=6, size=(6, 7))


def test_an_unknown_execution_is_refused_and_changes_nothing():
    model = small_net()
    rb.set_execution(model, "outputs")
    with pytest.raises(rb.ConfigurationError, match="fastest is unknown"):
        rb.set_execution(model, "fastest")
    assert method_of(model, image(2, 3, 9, 8), "outputs") == "outputs"
    assert {row.method for row in rb.execution_plan(model, (3, 9, 8)).blocks} == {"outputs"}


def test_a_model_without_blocks_has_an_empty_plan():
    model = nn.Conv2d(3, 4, 1)
    rb.set_execution(model, "merged")
    assert rb.execution_plan(model, (3, 5, 5)).blocks == ()


def test_a_plan_has_a_row_for_every_block_in_order_with_its_own_input():
    plan = rb.execution_plan(small_net(), (3, 9, 8), batch_size=4)
    assert [row.name for row in plan.blocks] == ["stem", "depthwise", "pointwise"]
    assert [row.block for row in plan.blocks] == ["RepVGGConv", "MobileOneConv", "MobileOneConv"]
    assert [tuple(row.input_size[-3:]) for row in plan.blocks] == [(3, 9, 8), (8, 5, 4), (8, 5, 4)]
    assert {row.method for row in plan.blocks} <= {"separate", "patches", "outputs"}
    assert all(row.reason for row in plan.blocks)


def test_a_plan_shows_every_row_and_reason():
    plan = rb.execution_plan(small_net(), (3, 9, 8))
    lines = str(plan).splitlines()
    for row in plan.blocks:
        assert any(row.name in line and row.method in line and row.reason in line for line in lines)


def test_asking_for_a_plan_leaves_the_model_as_it_was():
    model = small_net()
    rb.set_execution(model, "patches")
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    rb.execution_plan(model, (3, 9, 8))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert {row.method for row in rb.execution_plan(model, (3, 9, 8)).blocks} == {"patches"}


def test_a_plan_of_a_model_in_eval_mode_is_that_of_its_training():
    model = small_net()
    assert rb.execution_plan(copy.deepcopy(model).eval(), (3, 9, 8)) == rb.execution_plan(model, (3, 9, 8))


def test_the_plan_is_what_runs():
    """Only separate branches run the inner norms."""
    counts = {"stem": 2, "depthwise": 6, "pointwise": 2}
    for execution in EXECUTIONS:
        model = in_execution(small_net(), execution)
        plan = {row.name: row.method for row in rb.execution_plan(model, (3, 9, 8), batch_size=4).blocks}
        with mock.patch.object(nn.functional, "batch_norm", wraps=nn.functional.batch_norm) as norms:
            model(image(4, 3, 9, 8))
        assert norms.call_count == sum(counts[name] for name, method in plan.items() if method == "separate")


def test_auto_is_the_default_and_one_rule_for_all():
    plans = [rb.execution_plan(small_net(), (3, 32, 32)) for _ in range(2)]
    assert plans[0] == plans[1]
    auto = small_net()
    rb.set_execution(auto, "auto")
    assert rb.execution_plan(auto, (3, 32, 32)) == plans[0]


@pytest.mark.parametrize(
    ("name", "place", "methods"),
    [
        ("mobileone", over(6, 6, 1), {"patches", "outputs"}),
        ("mobileone", over(6, 6, 1, stride=2), {"patches", "outputs"}),
        ("mobileone", over(6, 6, 3, groups=6), {"patches", "outputs"}),
        ("mobileone", over(6, 6, 3, groups=6, stride=2), {"patches", "outputs"}),
        ("repvgg", over(3, 8, 3, stride=2), {"patches", "outputs"}),
        ("repvgg", over(6, 6, 3), {"outputs"}),
        ("repvgg", over(6, 6, 3, groups=2, stride=2), {"outputs"}),
        ("repvit", over(6, 6, 3, groups=6), {"patches", "outputs"}),
        ("repvit", over(6, 6, 3, groups=6, stride=2), {"patches", "outputs"}),
        ("repunit", over(6, 6, 7, groups=6, size=(12, 9)), {"patches", "outputs"}),
        ("acb", over(6, 6, 3), {"outputs"}),
        ("acb", over(6, 6, 3, groups=6), {"patches", "outputs"}),
        ("qarepvgg", over(6, 6, 3), {"outputs"}),
        ("plain", over(6, 6, 1), {"patches", "outputs"}),
        ("largekernel", over(6, 6, 5, groups=6), {"outputs"}),
        ("dilated", over(6, 6, 5, groups=6), {"outputs"}),
        ("repmixer", over(6, 6, 3, groups=6), {"patches", "outputs"}),
    ],
)
def test_these_blocks_merge(name, place, methods):
    block, x = block_and_image(name, place)
    assert {method for method in METHODS if method_of(block, x, method) == method} >= methods
    assert method_of(block, x, "merged") in methods


@every_block
def test_parameters_and_state_are_untouched_by_the_choice(name):
    block, x = block_and_image(name, PLACE)
    before = copy.deepcopy(block.state_dict())
    attributes = {key for key, _ in block.named_parameters()}
    for execution in EXECUTIONS:
        rb.set_execution(block, execution)
        assert list(block.state_dict()) == list(before)
        assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    for execution in EXECUTIONS:
        rb.set_execution(block, execution)
        block(x).sum().backward()
    assert list(block.state_dict()) == list(before)
    assert {key for key, _ in block.named_parameters()} == attributes
    BUILDERS[name](*PLACE.shape, groups=1).double().load_state_dict(block.state_dict())


@every_block
def test_eval_mode_runs_the_branches(name):
    block, x = block_and_image(name)
    expected = copy.deepcopy(block).eval().branches(x)
    for execution in EXECUTIONS:
        assert torch.equal(in_execution(block, execution).eval()(x), expected)


@over_methods
def test_eval_mode_follows_the_statistics_of_merged_training(method):
    block, x = block_and_image()
    outputs = []
    for execution in ("separate", method):
        twin = in_execution(block, execution)
        twin(x)
        outputs.append(twin.eval()(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)


def trained_by(executions):
    model, generator = small_net(), torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for execution in executions:
        rb.set_execution(model, execution)
        x = torch.randn(4, 3, 9, 8, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("method", ["merged", *METHODS, "auto"])
def test_switching_in_the_middle_of_training_changes_nothing_but_rounding(method):
    expected, left = trained_by(["separate"] * 6), trained_by(["separate"] * 3 + [method] * 3)
    for key, value in expected.items():
        error = largest(left[key].double() - value.double())
        assert error <= EXACT * max(largest(value), 1e-2), key


@over_methods
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_and_pickles_of_a_block_that_ran_keep_its_execution(duplicate, method):
    block, x = block_and_image()
    rb.set_execution(block, method)
    y = block(x)
    twin = duplicate(block)
    y.sum().backward()
    assert row_of(twin, x).method == method
    assert_same_step(twin, x, method)
    twin(x).sum().backward()
    kept = {p.data_ptr() for p in block.parameters()}
    assert not kept & {p.data_ptr() for p in twin.parameters()}


@over_methods
def test_a_copy_learns_by_itself(method):
    """Nothing that a block remembers of its branches is carried into the copy."""
    block, x = block_and_image()
    rb.set_execution(block, method)
    block(x)
    twin = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert_same_step(twin, x, method)


def test_blocks_inside_other_blocks_are_set_too():
    block = rb.RepNeXtBlock(6, 3)
    rb.set_execution(block, "outputs")
    assert [row.method for row in rb.execution_plan(block, (6, 9, 8)).blocks] == ["outputs"]
    rb.set_execution(block, "separate")
    assert [row.method for row in rb.execution_plan(block, (6, 9, 8)).blocks] == ["separate"]


@over_methods
def test_the_deploy_form_of_a_merged_block_holds_nothing_of_it(method):
    block, x = block_and_image()
    rb.set_execution(block, method)
    block(x).sum().backward()
    block.eval()
    deployed = rb.deployed(block)
    assert set(deployed.state_dict()) == {"conv.weight", "conv.bias"}
    torch.testing.assert_close(deployed(x), block(x), rtol=1e-10, atol=1e-10)
    block.switch_to_deploy()
    rb.set_execution(block, "merged")
    assert rb.execution_plan(block, (6, 6, 7)).blocks == ()
    assert [type(module) for module in block.children()] == [nn.Conv2d]
    assert not [value for value in vars(block).values() if isinstance(value, nn.Module)]


def test_a_training_model_can_be_traced_by_fx():
    block, x = block_and_image()
    for execution in EXECUTIONS:
        traced = torch.fx.symbolic_trace(nn.Sequential(in_execution(block, execution), nn.ReLU()).train())
        assert traced(x).shape == x.shape


@over_methods
def test_a_frozen_block_inside_a_training_model_runs_its_branches(method):
    """``block.eval()`` is what eval mode means, whatever the model around it does."""
    model = small_net()
    rb.set_execution(model, method)
    model.depthwise.eval()
    x = image(2, 3, 9, 8)
    twin = in_execution(model, "separate")
    torch.testing.assert_close(model(x), twin(x), rtol=1e-10, atol=1e-10)
    before = twin.depthwise.branches["identity"].running_mean
    assert torch.equal(model.depthwise.branches["identity"].running_mean, before)


@over_methods
def test_norms_that_train_in_a_block_in_eval_mode_leave_the_same(method):
    block, x = block_and_image()
    block.eval()
    for norm in batch_norms(block):
        norm.train()
    assert_same_step(block, x, method)


@over_methods
def test_threads_may_run_one_block_at_once(method):
    """As ``nn.DataParallel`` and servers do."""
    block, x = block_and_image()
    for norm in batch_norms(block):
        norm.track_running_stats = False
    twin = in_execution(block, method)
    expected = [step(copy.deepcopy(twin), factor * x)["output"] for factor in range(1, 9)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda factor: twin(factor * x), range(1, 9)))
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
