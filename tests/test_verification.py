import copy
import json
import math

import pytest
import torch
from support import calibrate
from torch import nn

from repblocks.blocks import RepNeXtBlock, RepVGGBlock, deployed
from repblocks.errors import VerificationError
from repblocks.models import create_model
from repblocks.verification import (
    HALF_PRECISION_FACTOR,
    TOLERANCES,
    EquivalenceReport,
    block_errors,
    most_different,
    verify,
)


class Net(nn.Sequential):
    """Two blocks of different papers, with an in-place activation between them."""

    def __init__(self):
        super().__init__(
            RepVGGBlock(3, 8, stride=2), nn.SiLU(inplace=True), RepNeXtBlock(8, kernel_sizes=((5, 5), (3, 1)))
        )


class Returning(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        return self.outputs(x)


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return calibrate(Net().double(), images()).to(dtype)


def images(dtype=torch.float64):
    return torch.randn(5, 3, 12, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def scaled(model, name, factor):
    """A copy with the weights of one module scaled."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.get_submodule(name).parameters():
            parameter.mul_(factor)
    return changed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_deploy_form_equals_its_train_form_in_every_precision(dtype):
    report = verify(net(dtype), deployed(net(dtype)), images(dtype))
    report.raise_if_different("the deploy form")
    assert report.passed
    assert report.samples == 5
    assert f"torch.{report.dtype}" == str(dtype)
    assert report.relative_error > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_wrong_weight_is_found_in_every_precision(dtype):
    report = verify(net(dtype), scaled(deployed(net(dtype)), "2.pointwise2", 1.5), images(dtype))
    assert not report.passed
    with pytest.raises(VerificationError, match=r"the collapsed model differs: relative error .* at most"):
        report.raise_if_different("the collapsed model")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scope", ["block", "model"])
def test_the_table_decides_exactly(dtype, scope):
    tolerance = TOLERANCES[dtype][scope]
    reference = nn.Conv2d(1, 1, 1, bias=False).to(dtype)
    for factor, passes in ((0.9, True), (1.1, False)):
        report = verify(
            reference,
            lambda x, f=factor: reference(x).double() * (1 + f * tolerance),
            images(dtype)[:, :1],
            scope=scope,
        )
        assert report.passed is passes
        assert report.tolerance == tolerance


def test_half_precision_is_judged_by_the_references_own_error():
    reference, inputs = net(torch.bfloat16), images(torch.bfloat16)
    exact = net().to(torch.bfloat16).double()(inputs.double())
    own_error = (exact - reference(inputs).double()).abs().max() / exact.abs().max()
    report = verify(reference, deployed(reference), inputs)
    assert report.tolerance == pytest.approx(HALF_PRECISION_FACTOR * own_error.item())
    assert verify(reference, lambda x: exact, inputs).relative_error == 0


def test_the_largest_error_and_the_largest_relative_error_are_reported():
    reference = Returning(lambda x: {"small": 0.01 * x, "large": [x]})
    report = verify(reference, lambda x: {"large": [x + 1e-3], "small": 0.01 * x + 1e-3}, images())
    assert report.max_abs_error == pytest.approx(1e-3)
    assert report.relative_error == pytest.approx(0.1 / images().abs().max().item())


def test_tuples_and_lists_hold_the_same_outputs():
    assert verify(Returning(lambda x: (x, (x + 1,))), lambda x: [x, [x + 1]], images()).passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_non_finite_outputs_fail_even_if_both_have_them(value, dtype):
    broken = nn.Sequential(nn.Conv2d(3, 4, 1), Returning(lambda x: x * value)).to(dtype)
    report = verify(broken, copy.deepcopy(broken), images(dtype))
    assert not report.passed
    assert report.relative_error == math.inf
    with pytest.raises(VerificationError, match="non-finite outputs"):
        report.raise_if_different("the copy")


def test_zeros_equal_zeros_and_nothing_else():
    zero = Returning(lambda x: 0 * x)
    assert verify(zero, zero, images()).passed
    assert not verify(zero, lambda x: 0 * x + 1e-30, images()).passed


def test_other_shapes_are_named():
    with pytest.raises(VerificationError, match=r"shape \(5, 3\) in the candidate and \(5, 3, 12, 18\)"):
        verify(Returning(lambda x: x), lambda x: x.mean((2, 3)), images())


def test_another_number_of_outputs_is_named():
    with pytest.raises(VerificationError, match="returns 1 tensors and the reference 2"):
        verify(Returning(lambda x: (x, x)), lambda x: x, images())


def test_no_images_prove_nothing():
    with pytest.raises(VerificationError, match="no inputs"):
        verify(net(), net(), images()[:0])


def test_a_dtype_without_a_rule_is_refused():
    model = nn.Conv2d(3, 4, 1)
    model.register_parameter("tiny", nn.Parameter(torch.zeros(3).to(torch.float8_e5m2), requires_grad=False))
    with pytest.raises(VerificationError, match=r"no tolerance is defined for torch\.float8_e5m2"):
        verify(model, model, images(torch.float32))


@pytest.mark.parametrize("role", ["reference", "candidate"])
@pytest.mark.parametrize("compare", [verify, block_errors])
def test_batch_statistics_are_refused(role, compare):
    models = {"reference": net(), "candidate": net()}
    models[role].train()
    before = copy.deepcopy(models[role].state_dict())
    with pytest.raises(VerificationError, match=rf"{role} is in train mode: 4 BatchNorm .*call {role}.eval\(\) first"):
        compare(models["reference"], models["candidate"], images())
    torch.testing.assert_close(models[role].state_dict(), before, rtol=0, atol=0)


def test_modes_and_inputs_are_left_as_they_were():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(3, 4, 1).double()).train()
    model[2].eval()
    inputs = images()
    report = verify(model, copy.deepcopy(model), inputs)
    assert report.relative_error == 0
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert torch.equal(inputs, images())


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(7, 4, 1).double()).train()
    with pytest.raises(RuntimeError, match="channels"):
        verify(model, model, images())
    assert all(module.training for module in model.modules())


def test_a_report_is_json():
    report = verify(net(), deployed(net()), images(), scope="block")
    written = json.loads(json.dumps(report.to_dict()))
    assert written.pop("passed") is True
    assert EquivalenceReport(**written) == report
    assert report.scope == "block"


def test_block_errors_of_equal_forms_are_rounding():
    errors = block_errors(net(), deployed(net()), images())
    assert {"", "0", "0.conv", "0.act", "1", "2"} <= errors.keys()
    assert max(errors.values()) < 1e-12


def test_parts_of_an_expanded_block_are_not_compared_but_the_block_is():
    errors = block_errors(net(), deployed(net()), images())
    assert errors.keys().isdisjoint({"2.token_mixer", "2.pointwise1", "2.pointwise2"})
    assert "2" in errors


def test_block_errors_are_local():
    errors = block_errors(net(), scaled(deployed(net()), "0.conv", 1.5), images())
    assert errors["0.conv"] == pytest.approx(0.5)
    assert errors["2"] < 1e-12
    assert errors[""] > 0.01


@pytest.mark.parametrize("name", ["rb_repvgg_cifar", "rb_repnext_cifar"])
def test_the_wrong_block_of_a_model_is_named(name):
    inputs = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    model = calibrate(create_model(name), inputs)
    blocks = [at for at, module in model.named_modules() if isinstance(module, (RepVGGBlock, RepNeXtBlock))]
    for wrong in (blocks[0], blocks[len(blocks) // 2], blocks[-1]):
        errors = block_errors(model, scaled(deployed(model), wrong, 1.01), inputs)
        named = most_different(errors)
        assert named == wrong or named.startswith(f"{wrong}.")


def test_shared_and_uncalled_modules_do_not_confuse_block_errors():
    shared = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Conv2d(4, 4, 1), shared).double()
    model.add_module("unused", nn.Sequential())
    errors = block_errors(model, scaled(model, "2", 2.0), images())
    assert errors == {"0": 0, "1": 0, "2": pytest.approx(1), "unused": 0, "": pytest.approx(1, rel=0.9)}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_compared_with_itself_has_no_errors():
    model = net()
    assert set(block_errors(model, model, images()).values()) <= {0.0}


def test_the_block_to_look_at_is_the_innermost_that_explains_the_error():
    errors = {"": 0.5, "stem": 1e-7, "stages": 0.4, "stages.0": 1e-7, "stages.1": 0.2, "stages.1.conv": 0.1}
    assert most_different(errors) == "stages.1.conv"
    assert most_different({**errors, "stages.1.conv": 1e-7}) == "stages.1"
    assert most_different({"": 0.5, "a": 1e-7}) == ""
    assert most_different({"a": 1e-7, "b": 1e-6}) == "b"
    assert most_different({"": math.inf, "a": 0.0, "b": math.inf, "b.c": math.inf, "b.d": 1.0}) == "b.c"
    assert most_different({"": 0.0, "a": 0.0}) == ""
