"""`expand` as a user calls it: choice of layers, report, refusals, and models of timm and torchvision."""

import copy
import json
import pickle

import pytest
import timm
import torch
import torchvision
from expansion.expand_cases import (
    assert_comes_back,
    assert_same_function,
    assert_same_training,
    expanded_all,
    images,
    net,
    pair,
)
from support import calibrate
from torch import nn

import repblocks as rb
from repblocks.blocks.registry import BLOCKS
from repblocks.calibration import batch_norms
from repblocks.expansion.expand import expand
from repblocks.expansion.expanded import ExpandedConv
from repblocks.graph import collapse

NAMES = ["second", "first", "down.0", "stem.0"]


def expanded(*args, **options):
    return [row.name for row in expand(*args, **options).report.expanded]


def test_by_default_only_convolutions_are_expanded_to_which_the_block_adds_something():
    plain = net()
    assert expanded(plain) == ["second", "first", "stem.0"]
    (row,) = expand(plain).report.skipped
    assert row.name == "down.0"
    assert "only add copies of its kernel" in row.reason
    assert expanded(plain, "dbb") == NAMES
    assert expanded(plain, "plain") == []


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("*", NAMES),
        ("down.*", ["down.0"]),
        ("s*", ["second", "stem.0"]),
        (["first", "stem.*"], ["first", "stem.0"]),
        (("*",), NAMES),
        (lambda name, conv: conv.stride == (2, 2), ["second", "down.0"]),
        (lambda name, conv: False, []),
    ],
)
def test_where_chooses_by_glob_or_predicate(where, names):
    plain = net()
    model, report = expand(plain, where=where)
    assert [row.name for row in report.expanded] == names
    assert report.skipped == ()
    assert [name for name, m in model.named_modules() if isinstance(m, ExpandedConv)] == names


@pytest.mark.parametrize("where", ["layer1.*", ["first", "Stem*"]])
def test_a_glob_that_matches_nothing_is_an_error(where):
    with pytest.raises(rb.ConfigurationError, match=r"matches none of the 4 convolutions: second, first"):
        expand(net(), where=where)


def test_what_where_leaves_out_is_not_in_the_report():
    report = expand(net(), "edge", where=["down.0", "first"]).report
    assert [row.name for row in report.expanded] == ["first"]
    assert [row.name for row in report.skipped] == ["down.0"]
    assert "kernel_size of at least 3" in report.skipped[0].reason


def test_the_report_is_readable_and_json():
    report = expand(net(), "qarepvgg", where=["first", "stem.0"]).report
    text = str(report)
    assert "2 of 2 convolutions became 'qarepvgg' blocks, init='preserve'" in text
    assert "first + first_norm: 3x3 convolution 6 -> 6 becomes QARepVGGConv, 336 -> 384 parameters" in text
    assert "preserves eval only" in text
    rows = json.loads(json.dumps(report.to_dict()))["expanded"]
    assert rows[0] == {
        "name": "first",
        "norm": "first_norm",
        "before": "3x3 convolution 6 -> 6",
        "after": "QARepVGGConv",
        "params_before": 336,
        "params_after": 384,
        "preserves": "eval only",
    }


def test_an_expansion_of_nothing_says_so():
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model, report = expand(plain)
    assert "WARNING: nothing was expanded" in str(report)
    assert report.expanded == report.skipped == ()
    assert "WARNING" not in str(expand(net()).report)
    assert_same_function(plain, model, torch.randn(3, 3))


def test_parameters_are_counted_as_they_are():
    plain, (model, report) = net(), expand(net(), where="*")
    grown = sum(row.params_after - row.params_before for row in report.expanded)
    counts = [sum(parameter.numel() for parameter in m.parameters()) for m in (plain, model)]
    assert counts[1] - counts[0] == grown > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": "abc"}, "block=abc is unknown; did you mean one of: acb"),
        ({"init": "zero"}, "init=zero is unknown"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(rb.ConfigurationError, match=message):
        expand(net(), **arguments)


@pytest.mark.parametrize("model", [nn.Conv2d(3, 4, 3, device="meta"), nn.Sequential(nn.LazyConv2d(4, 3))])
def test_models_without_weights_are_refused(model):
    with pytest.raises(rb.ConfigurationError, match="has no values yet"):
        expand(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_scripts_are_refused():
    with pytest.raises(rb.ConfigurationError, match="compiled script"):
        expand(torch.jit.script(net()))


def test_weights_that_are_not_finite_raise_and_name_the_layer():
    plain = net()
    with torch.no_grad():
        plain.first.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(rb.VerificationError, match="first would change by nan"):
        expand(plain)


def test_a_block_registered_by_a_user_expands_by_the_same_rules(monkeypatch):
    monkeypatch.setitem(BLOCKS, "mine", rb.ACConv)
    assert expanded(net(), "mine") == expanded(net(), "acb")


def test_weights_load_into_the_same_expansion_and_the_plain_ones_say_when_to():
    plain = net()
    model, again = expand(plain).model, expand(net(channels=6), init="fresh").model
    again.load_state_dict(model.state_dict(), strict=True)
    assert_same_function(model, again)
    with pytest.raises(rb.CheckpointError, match=r"second.weight belongs to the model before its expansion"):
        model.load_state_dict(plain.state_dict())
    with pytest.raises(rb.CheckpointError, match="the model is in train form"):
        model.load_state_dict(rb.deployed(model).state_dict())
    with pytest.raises(rb.CheckpointError, match="the model is in deploy form"):
        rb.deployed(model).load_state_dict(model.state_dict())


@pytest.mark.parametrize("block", ["acb", "edge"])
def test_copies_pickles_and_casts_of_an_expanded_model_contract(block):
    plain = net()
    model = expand(plain, block).model
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_function(plain, twin)
        assert_comes_back(plain, twin)
    assert_comes_back(copy.deepcopy(plain).float(), copy.deepcopy(model).float(), images().float())
    assert_comes_back(nn.Sequential(plain, nn.ReLU()), nn.Sequential(model, nn.ReLU()))


def test_an_expanded_model_can_be_traced_and_exported():
    model = expanded_all(net())
    x = images()
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_folding_an_expanded_pair_gives_what_it_computes():
    plain, x = pair(bias=True), images()
    for block in ("acb", "edge"):
        expanded = expanded_all(plain, block).eval()
        for form in (expanded, rb.deployed(expanded)):
            assert torch.allclose(rb.fold(form, 4)(x), plain(x), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "block", "count", "size"),
    [
        (lambda: timm.create_model("resnet18", num_classes=7), "acb", 17, (49, 64)),
        (lambda: timm.create_model("resnet10t", num_classes=7, channels=(16, 16, 32, 32)), "dbb", None, (49, 64)),
        (lambda: timm.create_model("efficientnet_b0", num_classes=7), "acb", 17, (49, 64)),
        (lambda: timm.create_model("mobilenetv3_small_050", num_classes=7), "dbb", None, (49, 64)),
        (lambda: timm.create_model("vgg11_bn", num_classes=7).features, "acb", 8, (40, 64)),
        (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=7), "repvgg", None, (49, 64)),
        (lambda: torchvision.models.mobilenet_v2(num_classes=7), "mobileone", None, (49, 64)),
    ],
)
def test_models_of_timm_and_torchvision_compute_the_same_and_come_back(make, block, count, size):
    torch.manual_seed(0)
    x = images(3, batch=3, size=size)
    plain = calibrate(make().double(), x)
    model, report = expand(plain, block)
    assert len(report.expanded) == count or (count is None and len(report.expanded) > 10)
    assert {row.preserves for row in report.expanded} == {"train and eval"}
    assert_same_function(plain, model, x)
    assert_comes_back(plain, model, x)


def test_convnext_has_no_norms_to_expand_with_and_says_so():
    plain = timm.create_model("convnext_atto", num_classes=7)
    report = expand(plain, where="*").report
    assert not report.expanded
    assert all("no BatchNorm of its own behind it" in row.reason for row in report.skipped)
    assert expanded(plain, "edge", where="stages.0.*.conv_dw") == [f"stages.0.blocks.{i}.conv_dw" for i in (0, 1)]


@pytest.mark.parametrize(("name", "block"), [("resnet10t", "acb"), ("mobilenetv3_small_050", "repvgg")])
def test_models_of_timm_train_alike(name, block):
    torch.manual_seed(0)
    x = images(3, batch=5, size=(49, 64))
    plain = calibrate(timm.create_model(name, num_classes=7).double(), x)
    assert_same_training(plain, expand(plain, block).model, x)


@pytest.mark.parametrize("block", ["acb", "edge"])
def test_an_expanded_model_collapses(block):
    plain = net()
    collapsed = collapse(expand(plain, block).model.eval(), images()).model
    assert not batch_norms(collapsed)
    assert sum(isinstance(module, nn.Conv2d) for module in collapsed.modules()) == 4
    assert_same_function(plain, collapsed)
