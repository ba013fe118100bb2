import json
import math

import pytest
import torch
from export.cases import pictures, small
from torch import nn

from repblocks.blocks import deployed
from repblocks.export import export, half_range
from repblocks.export.half_range import FLOAT16_MAX


def with_gain(model, layer, gain):
    """A copy whose layer gives outputs times a gain, which the next layer takes back."""
    with torch.no_grad():
        for parameter in model.get_submodule(layer).parameters():
            parameter.mul_(gain)
    return model


def test_a_model_of_ordinary_numbers_fits():
    report = half_range(deployed(small()), [pictures(4)])
    assert report.fits
    assert report.samples == 4
    assert {extreme.kind for extreme in report.largest} == {"activation", "weight"}
    assert "fits into float16" in str(report)


def test_the_innermost_layer_whose_output_overflows_is_named():
    model = with_gain(deployed(small()), "stages.1.0.conv.conv", 1e6)
    report = half_range(model, [pictures(4)])
    activations = [extreme.layer for extreme in report.overflows if extreme.kind == "activation"]
    assert activations[0] == "stages.1.0.conv.conv"
    assert "stages.1.0" not in activations
    assert all(extreme.value > FLOAT16_MAX for extreme in report.overflows)


def test_a_weight_that_overflows_is_named_even_if_its_output_does_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(7e4)
    report = half_range(model, [torch.zeros(1, 3, 4, 4)])
    assert [(extreme.layer, extreme.kind, extreme.value) for extreme in report.overflows] == [("0", "weight", 7e4)]


def test_what_overflows_here_is_what_float16_gives_as_infinite():
    """The largest float16 fits and the next larger number does not; the model in float16 is the judge."""
    for gain, fits in ((FLOAT16_MAX, True), (65536.0, False)):
        model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Identity())
        with torch.no_grad():
            model[0].weight.fill_(gain / 2)
        images = torch.full((1, 1, 2, 2), 2.0)
        assert half_range(model, [images]).fits == fits
        assert model.half()(images.half()).isfinite().all() == fits


def test_a_sum_that_overflows_is_named_by_the_module_around_it():
    class Sum(nn.Module):
        def forward(self, x):
            return x + x

    report = half_range(nn.Sequential(Sum(), nn.Sigmoid()), [torch.full((1, 1, 2, 2), 4e4)])
    assert [extreme.layer for extreme in report.overflows] == ["0"]


def test_a_float16_model_is_judged_by_the_numbers_it_would_have():
    model = with_gain(deployed(small()), "stem.conv.conv", 3e4).half()
    assert model.stem.conv.conv.weight.isfinite().all()
    report = half_range(model, [pictures(2).half()])
    assert "stem.conv.conv" in [extreme.layer for extreme in report.overflows]
    assert next(model.parameters()).dtype == torch.float16


def test_numbers_that_are_not_finite_are_overflows_and_valid_json():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    with torch.no_grad():
        model[0].bias.fill_(math.nan)
    report = half_range(model, [torch.zeros(1, 1, 2, 2)])
    assert not report.fits
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["overflows"][0]["value"] == "nan"


def test_the_model_keeps_no_hooks():
    model = deployed(small())
    half_range(model, [pictures(1)])
    assert not any(module._forward_hooks for module in model.modules())


def test_an_export_reports_and_records_what_would_overflow(tmp_path):
    model = small()
    with torch.no_grad():
        model.head.fc.weight.mul_(1e8)
    report = export(model, tmp_path, formats=["safetensors"])
    assert [extreme.layer for extreme in report.half_range.overflows] == ["head.fc", "head.fc"]
    recorded = json.loads(report.manifest.read_text())["float16"]
    assert not recorded["fits"]
    assert {row["kind"] for row in recorded["overflows"]} == {"weight", "activation"}
    assert "float16 overflows at 65504: weight " in str(report.half_range)


@pytest.mark.parametrize("count", [1, 3])
def test_every_batch_is_seen(count):
    batches = [torch.zeros(1, 1, 2, 2)] * count + [torch.full((1, 1, 2, 2), 1e5)]
    assert not half_range(nn.Sequential(nn.ReLU()), batches).fits


def test_a_variance_that_overflows_is_named():
    """BatchNorm in float16 would divide by infinity, and give its bias whatever it reads."""
    norm = nn.BatchNorm2d(1).eval()
    norm.running_var.fill_(1e6)
    images = torch.full((1, 1, 2, 2), 1e3)
    report = half_range(norm, [images])
    assert [(extreme.kind, extreme.value) for extreme in report.overflows] == [("weight", 1e6)]
    assert norm(images).abs().min() > 0.9
    assert not norm.half()(images.half()).any()


def test_counters_do_not_become_float16():
    norm = nn.BatchNorm2d(1).eval()
    norm.num_batches_tracked.fill_(10**6)
    assert half_range(norm, [torch.zeros(1, 1, 2, 2)]).fits


def test_nan_is_not_hidden_by_larger_numbers_before_or_after_it():
    for order in ([1.0, math.nan, 2.0], [math.nan, 1e9], [1e9, math.nan]):
        report = half_range(nn.Sequential(nn.ReLU()), [torch.full((1, 1, 2, 2), value) for value in order])
        assert [extreme.layer for extreme in report.overflows] == ["0"]
        assert not report.overflows[0].value <= FLOAT16_MAX


def test_nan_among_numbers_of_one_output_is_found():
    images = torch.zeros(1, 1, 2, 2)
    images[0, 0, 1, 1] = math.nan
    report = half_range(nn.Sequential(nn.ReLU()), [images])
    assert math.isnan(report.overflows[0].value)
    assert math.isnan(report.largest[0].value)
    assert "float16 overflows at 65504: activation nan of '0'" in str(report)


def test_a_layer_whose_name_only_begins_like_anothers_does_not_stand_for_it():
    class Large(nn.Module):
        def forward(self, x):
            return x + 1e5

    net = nn.Sequential(*(Large() if place in (1, 10) else nn.Sigmoid() for place in range(11)))
    assert [extreme.layer for extreme in half_range(net, [torch.zeros(1, 1, 2, 2)]).overflows] == ["1", "10"]
