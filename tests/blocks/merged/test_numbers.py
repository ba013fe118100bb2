"""Precision where it is hard to keep: large means, dead channels, half precision, values that are not numbers."""

import copy
import re

import pytest
import torch
from blocks.claims import BUILDERS
from blocks.merged.cases import (
    METHODS,
    assert_same_step,
    cotangent,
    image,
    in_execution,
    left_by,
    made,
    method_of,
    over,
    scales,
    step,
    stepped,
)
from blocks.merged.mixtures import make_mixture
from support import batch_norms
from torch import nn

import repblocks as rb

PLACES = {
    "dense": over(4, 6, 3, size=(12, 14)),
    "stem": over(3, 8, 3, stride=2, size=(16, 14), channels_last=True),
    "pointwise": over(6, 6, 1, size=(12, 14)),
    "pointwise_stride_2": over(6, 8, 1, stride=2, size=(12, 15)),
    "depthwise": over(6, 6, 3, groups=6, size=(12, 14)),
    "depthwise_channels_last": over(6, 6, 3, groups=6, size=(12, 14), channels_last=True),
    "depthwise_stride_2": over(6, 6, 3, groups=6, stride=2, size=(12, 15)),
    "depthwise_kernel_5": over(6, 6, 5, groups=6, size=(9, 14)),
}
over_places = pytest.mark.parametrize("place", PLACES)
over_methods = pytest.mark.parametrize("method", METHODS)


def relative(got, exact):
    return ((got.double() - exact).abs() / exact.abs().clamp(min=1e-300)).max().item()


def of_the_last_batch(block):
    """Running statistics that are those of the last batch alone."""
    for norm in batch_norms(block):
        norm.momentum = 1.0
    return block.train()


def norm_buffers(left, kind):
    return {name: value for name, value in left.items() if name.endswith(kind)}


def assert_variances_survive(block, x, method):
    """Of an input in float32: within 1e-4 of those of separate branches in float64."""
    exact = step(in_execution(block, "separate").double(), x.double())
    left = step(in_execution(block, method), x)
    for buffer, value in norm_buffers(exact, "running_var").items():
        assert relative(left[buffer], value) <= 1e-4


@over_methods
@over_places
@pytest.mark.parametrize("name", ["repvgg", "mobileone", "acb", "repvit", "qarepvgg", "norms_in_series"])
def test_variances_in_float32_survive_a_mean_of_a_thousand_deviations(name, place, method):
    """Unpadded, so that the map keeps no border of deviations as large as the mean."""
    geometry = PLACES[place]
    make = BUILDERS.get(name) or make_mixture(name)
    block = of_the_last_batch(make(*geometry.shape, **geometry.arguments(), padding=0))
    x = (geometry.image().detach() + 1e3).float().contiguous(memory_format=torch.channels_last)
    assert_variances_survive(block, x, method)


@over_methods
@over_places
def test_padded_variances_in_float32_survive_a_large_mean(place, method):
    """Channels far from zero on either side, with a border of zeros: each within 1e-4 of its own variance."""
    geometry = PLACES[place]
    block = of_the_last_batch(BUILDERS["mobileone"](*geometry.shape, **geometry.arguments()))
    shift = torch.tensor([1e3, -1e3, 0.0, 30.0, 1e3, 1.0])[: geometry.shape[0], None, None]
    x = geometry.image().detach().float() + shift
    assert_variances_survive(block, x, method)


@over_methods
@over_places
def test_float32_is_as_close_to_float64_as_separate_branches_are(place, method):
    """Twice their error and what rounding makes of a number: merged sums are other sums, not worse ones."""
    geometry = PLACES[place]
    exact = made(BUILDERS["mobileone"], geometry)
    block, x = copy.deepcopy(exact).float(), geometry.image().detach().float().requires_grad_()
    truth = step(in_execution(exact, "separate"), x.double())
    separate, merged = step(in_execution(block, "separate"), x), step(in_execution(block, method), x)
    for name, size in scales(exact, x.double(), truth).items():
        errors = [(left[name].double() - truth[name]).abs().max().item() for left in (separate, merged)]
        assert errors[1] <= 2 * errors[0] + 2e-6 * size, name


@over_methods
@over_places
@pytest.mark.parametrize("value", [0.0, 0.7, -250.0])
def test_a_channel_without_variance_leaves_the_same(place, value, method):
    """Behind a ReLU a channel may be dead; what rounding leaves of its variance is no number below -eps."""
    x = PLACES[place].image().detach().relu()
    x[:, 1] = value
    assert_same_step(made(BUILDERS["mobileone"], PLACES[place]), x.requires_grad_(), method)


@over_methods
@pytest.mark.parametrize("value", [0.3, 1e4])
def test_a_constant_image_gives_shifts_and_no_nan(value, method):
    x = torch.full((3, 6, 5, 6), value)
    block = in_execution(BUILDERS["mobileone"](6, 6, 1, groups=1).train(), method)
    left = step(block, x)
    assert all(tensor.isfinite().all() for tensor in left.values())
    assert largest_variance(left) <= 0.9 + 1e-6  # 0.9 of the initial one, and nothing


def largest_variance(left):
    return max(value.max().item() for value in norm_buffers(left, "running_var").values())


@over_methods
@over_places
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_reach_output_and_statistics(place, value, method):
    geometry = PLACES[place]
    x = geometry.image().detach()
    x[0, 0, 4, 4] = value
    block = made(BUILDERS["mobileone"], geometry)
    expected, left = (step(in_execution(block, how), x) for how in ("separate", method))
    for name, tensor in expected.items():
        seen = left[name].isfinite() if tensor.is_floating_point() else left[name] == tensor
        assert not (seen & ~tensor.isfinite()).any(), name
    assert not left["output"].isfinite().all()


@over_methods
@pytest.mark.parametrize("place", [over(6, 6, 1, size=(1, 1), batch=1), over(4, 4, 3, size=(1, 1), batch=1, groups=4)])
def test_one_value_per_channel_is_refused_as_batch_norm_does(place, method):
    block, x = made(BUILDERS["mobileone"], place), place.image()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as expected:
        in_execution(block, "separate")(x)
    before = copy.deepcopy(dict(block.named_buffers()))
    twin = in_execution(block, method)
    with pytest.raises(ValueError, match=re.escape(str(expected.value))):
        twin(x)
    after = dict(twin.named_buffers())
    assert all(torch.equal(value, before[name]) for name, value in after.items() if "num_batches" not in name)


@over_methods
def test_one_value_per_channel_is_enough_for_frozen_norms(method):
    place = over(6, 6, 1, size=(1, 1), batch=1)
    block = made(BUILDERS["mobileone"], place)
    for module in block.branches.modules():
        module.training = False
    assert_same_step(block, place.image(), method)


@over_methods
@pytest.mark.parametrize("shape", [(6, 5, 5), (2, 3, 5, 5), (2, 6, 5)])
def test_inputs_of_another_shape_are_refused_as_by_separate_branches(shape, method):
    block = made(BUILDERS["mobileone"], over(6, 6, 3))
    for how in ("separate", method):
        with pytest.raises((ValueError, RuntimeError)):
            in_execution(block, how)(torch.randn(shape, dtype=torch.float64))


@over_methods
def test_inputs_of_another_dtype_are_refused(method):
    for place in PLACES.values():
        block = made(BUILDERS["mobileone"], place)
        with pytest.raises(RuntimeError):
            in_execution(block, method)(place.image().float())


def step_under_autocast(block, x, execution):
    twin, leaf = in_execution(block, execution), x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = twin(leaf)
    y.backward(cotangent(y))
    assert y.dtype in (torch.float32, torch.bfloat16)
    assert all(b.dtype == torch.float32 for b in twin.buffers() if b.is_floating_point())
    return {"output": y.detach()} | left_by(twin, leaf)


def typical_errors(left, truth, size, first="b"):
    """Root of the mean squared error of each kind of number, relative to its size: one rounding is a matter of luck."""
    kinds = {
        "output": "output",
        "input": "gradient of input",
        "gradients": f"gradient of {first}",
        "statistics": "buffer",
    }
    errors = {name: ((left[name].double() - truth[name].double()) / size[name]).square().mean() for name in truth}
    return {
        kind: torch.stack([error for name, error in errors.items() if name.startswith(start)]).mean().sqrt().item()
        for kind, start in kinds.items()
    }


@over_methods
@over_places
@pytest.mark.parametrize("name", ["repvgg", "mobileone", "repvit"])
def test_bfloat16_autocast_is_as_close_as_with_separate_branches(name, place, method):
    """Statistics stay in float32, and nothing is more than twice as far from float64 as with separate branches."""
    geometry = PLACES[place]
    block, x = made(BUILDERS[name], geometry).float(), geometry.image().detach().float()
    exact, wide = copy.deepcopy(block).double(), x.double().requires_grad_()
    truth = stepped(exact, wide, "separate")
    size = scales(exact, wide, truth)
    separate, merged = (typical_errors(step_under_autocast(block, x, how), truth, size) for how in ("separate", method))
    for kind, error in merged.items():
        assert error <= 2 * separate[kind], kind


@over_methods
def test_blocks_in_a_row_take_each_others_half_precision(method):
    """Under autocast the second block reads what the first one gives, of another dtype than its own parameters."""
    first, second = (made(BUILDERS["mobileone"], place) for place in (over(6, 6, 1), over(6, 6, 3, groups=6)))
    net, x = nn.Sequential(first, nn.ReLU(), second).float(), image(3, 6, 9, 8).detach().float()
    truth = stepped(copy.deepcopy(net).double(), x.double().requires_grad_(), "separate")
    size = {name: max(value.abs().max().item(), 1e-3) for name, value in truth.items()}
    plain, merged = (typical_errors(step_under_autocast(net, x, how), truth, size, "0") for how in ("separate", method))
    assert all(error <= 2 * plain[kind] for kind, error in merged.items())


@over_methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", ["pointwise", "depthwise", "dense"])
def test_parameters_in_half_precision_run_visibly_or_right(place, dtype, method):
    geometry = PLACES[place]
    exact = made(BUILDERS["mobileone"], geometry)
    block, x = copy.deepcopy(exact).to(dtype), geometry.image().detach().to(dtype)
    truth = step(in_execution(exact, "separate"), x.double())
    separate, merged = (step(in_execution(block, how), x) for how in ("separate", method))
    assert {value.dtype for value in merged.values()} == {value.dtype for value in separate.values()}
    for name in ("output", "gradient of branches.kxk0.0.weight", "buffer branches.kxk0.1.running_var"):
        errors = [(left[name].double() - truth[name]).abs().max().item() for left in (separate, merged)]
        assert errors[1] <= 2 * errors[0] + torch.finfo(dtype).eps * truth[name].abs().max().item(), name
    plan = rb.execution_plan(in_execution(block, method), tuple(x.shape[1:]), batch_size=len(x))
    assert plan.blocks[0].method in ("separate", method)
    assert plan.blocks[0].reason


@pytest.mark.parametrize("value", [1e-30])
def test_a_norm_without_eps_leaves_the_same(value):
    place = over(4, 4, 3, groups=4)
    block = made(make_mixture("norms_of_all_kinds"), place)
    for norm in batch_norms(block):
        norm.eps = value
    assert_same_step(block, place.image())


@over_methods
def test_an_empty_batch_gives_an_empty_output(method):
    block = made(BUILDERS["mobileone"], over(6, 6, 1))
    x = image(0, 6, 4, 5)
    expected, left = (in_execution(block, how)(x) for how in ("separate", method))
    assert left.shape == expected.shape


def test_the_methods_under_test_run():
    for place, geometry in PLACES.items():
        block, x = made(BUILDERS["mobileone"], geometry), geometry.image()
        assert method_of(block, x, "outputs") == "outputs", place
        assert method_of(block, x, "patches") == "patches", place
