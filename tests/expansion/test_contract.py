"""Back from the expanded model to the original architecture."""

import copy

import pytest
import timm
import torch
from expansion.expand_cases import (
    EXACT,
    assert_comes_back,
    assert_equal,
    assert_original_architecture,
    assert_same_function,
    expanded_all,
    images,
    net,
    pair,
    relative,
)
from support import calibrate
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import nn

import repblocks as rb
from repblocks.calibration import batch_norms
from repblocks.expansion.contract import contract
from repblocks.expansion.expand import expand
from repblocks.expansion.expanded import ExpandedConv, ExpandedNorm
from repblocks.expansion.fitting import fitted

BLOCKS = sorted(set(rb.BLOCKS) - {"repmixer"})
every_block = pytest.mark.parametrize("block", BLOCKS)


def trained(model, steps=5, x=None):
    """A few steps of SGD in train mode, towards a fixed target."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    model.train()
    for seed in range(steps):
        batch = images(seed=seed) if x is None else x
        out = model(batch)
        loss = (out - out.detach().roll(1, 0) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@every_block
def test_every_branch_moves_in_training_and_the_contracted_model_equals_the_trained_one(block):
    plain = net(bias=True)
    model = expand(plain, block, where=["first", "second", "stem.*"]).model
    start = copy.deepcopy(model)
    trained(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    # In front of a BatchNorm a bias has no gradient but rounding.
    assert {name for name, _ in model.named_parameters() if "bias" not in name} <= moved
    assert relative(plain(images()), model.eval()(images())) > 0.01
    assert_comes_back(plain, model.train())


@every_block
def test_a_fresh_expansion_trains_and_comes_back(block):
    plain = net(bias=True)
    model = trained(expand(plain, block, where=["first", "second"], init="fresh").model)
    assert_comes_back(plain, model)


@every_block
@pytest.mark.parametrize("geometry", [{"groups": 2}, {"bias": True, "stride": 2}, {"padding_mode": "reflect"}], ids=str)
def test_deploy_form_contracts_as_train_form_does(block, geometry):
    plain = pair(4, 6, **geometry)
    model = trained(expanded_all(plain, block)).eval()
    assert_comes_back(plain, rb.deployed(model))
    rb.switch_to_deploy(model)
    assert_comes_back(plain, model)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of torch, about its own convolution
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
@pytest.mark.parametrize("block", ["acb", "dbb", "orepa"])
def test_uneven_padding_survives_the_detour_through_deploy_form(block, dilation):
    plain = pair(4, 6, (3, 4), padding="same", dilation=dilation, groups=2)
    model = trained(expanded_all(plain, block)).eval()
    deployed = rb.deployed(model)
    assert deployed.conv.conv.kernel_size != plain.conv.kernel_size  # grown by zeros around and between its taps
    assert_comes_back(plain, deployed)


def test_a_value_of_another_geometry_does_not_fit():
    conv = rb.fold(nn.Conv2d(4, 6, 3, padding=1, bias=False).double())
    larger = nn.Conv2d(4, 6, 5, padding=2, bias=False).double()
    with pytest.raises(rb.FoldError, match="reads pixels that"):
        fitted(rb.fold(larger), conv)
    with torch.no_grad():
        larger.weight[:, :, [0, -1]] = 0
        larger.weight[:, :, :, [0, -1]] = 0
    assert torch.equal(fitted(rb.fold(larger), conv), larger.weight[:, :, 1:-1, 1:-1])
    others = [{"stride": 2, "padding": 1}, {"padding": 2}, {"padding": 2, "dilation": 2}]
    others += [{"padding": 1, "groups": 2}, {"padding": 1, "padding_mode": "reflect"}]
    for geometry in others:
        with pytest.raises(rb.FoldError, match="needed the geometry of"):
            fitted(rb.fold(nn.Conv2d(4, 6, 3, bias=False, **geometry)), conv)


@pytest.mark.parametrize("mode", [True, False])
def test_settings_come_back(mode):
    plain = net(norm=lambda channels: nn.BatchNorm2d(channels, eps=0.01, momentum=0.3)).train(mode)
    plain.first.weight.requires_grad = False
    plain.second_norm.bias.requires_grad = False
    plain.stem[1].eval()
    back = contract(expand(plain).model)
    assert_original_architecture(plain, back)
    for old, new in zip(plain.modules(), back.modules(), strict=True):
        assert old.training == new.training
        assert old.extra_repr() == new.extra_repr()
    for old, new in zip(plain.parameters(), back.parameters(), strict=True):
        assert old.requires_grad == new.requires_grad
    assert [norm.num_batches_tracked for norm in batch_norms(plain)] == [
        norm.num_batches_tracked for norm in batch_norms(back)
    ]


def test_the_mode_is_that_of_the_expanded_model():
    model = expand(net()).model
    assert all(module.training for module in contract(model.train()).modules())
    assert not any(module.training for module in contract(model.eval()).modules())


def test_batches_seen_are_counted_on():
    plain = net()
    before = plain.first_norm.num_batches_tracked.item()
    model = trained(expand(plain, where="first").model, steps=4)
    assert contract(model).first_norm.num_batches_tracked == before + 4


def test_the_expanded_model_is_not_touched():
    model = expand(net()).model.train()
    before = copy.deepcopy(model.state_dict())
    contract(model, [images()])
    assert isinstance(model.first, ExpandedConv)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_contracted_norms_only_shift(affine, bias):
    plain = pair(bias=bias, norm=lambda channels: nn.BatchNorm2d(channels, affine=affine))
    back = contract(trained(expanded_all(plain, "dbb")))
    assert torch.equal((back.norm.running_var + back.norm.eps).rsqrt(), torch.ones(6).double())
    assert back.norm.running_mean.any() == (not affine)
    if bias:
        assert not back.conv.bias.any()


def test_float32_norms_scale_by_one_to_rounding():
    back = contract(expanded_all(pair().float()))
    scale = (back.norm.running_var + back.norm.eps).rsqrt()
    assert (scale - 1).abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("block", ["acb", "edge"])
def test_statistics_are_those_over_all_batches(block):
    plain = pair()
    model = trained(expanded_all(plain, block)).eval()
    batches = [images(seed=seed, batch=batch) + seed for seed, batch in enumerate((3, 1, 5))]
    back = contract(model, iter(batches))
    assert_original_architecture(plain, back)
    assert_same_function(model, back)
    maps = back.conv(torch.cat(batches)).detach()
    assert_equal(maps.mean((0, 2, 3)), back.norm.running_mean)
    assert_equal(maps.var((0, 2, 3)), back.norm.running_var)
    back.norm.momentum = None
    together, alone = copy.deepcopy(back).train()(torch.cat(batches)), back(torch.cat(batches))
    assert relative(alone, together) < 1e-2  # biased and unbiased variance apart: batch statistics change nothing


def test_a_whole_model_trains_on_from_estimated_statistics_as_from_its_own():
    plain = net()
    model = trained(expand(plain, "dbb", where="*").model).eval()
    batches = [images(seed=seed) for seed in range(4)]
    for back in (contract(model, batches), contract(model.train(), batches)):
        assert_same_function(model, back)
    everything = torch.cat(batches)
    plainly, estimated = contract(model), contract(model, batches)
    gaps = [relative(m.eval()(everything), m.train()(everything)) for m in (plainly, estimated)]
    assert gaps[1] < 0.05 < gaps[0]


def test_norms_without_weights_keep_their_function_under_batches():
    plain = pair(norm=lambda channels: nn.BatchNorm2d(channels, affine=False))
    model = trained(expanded_all(plain))
    assert_same_function(model, contract(model, [images()]))


@pytest.mark.parametrize("missing", ["weight", "bias"])
@pytest.mark.parametrize("block", ["acb", "orepa", "edge"])
def test_norms_may_lack_either_parameter(block, missing):
    plain = pair()
    setattr(plain.norm, missing, None)
    model = expanded_all(plain, block)
    assert_same_function(plain, model)
    assert_comes_back(plain, trained(model))
    assert_same_function(model, contract(model, [images()]))


def test_timms_synchronised_and_activated_norms_come_back():
    plain = pair(norm=BatchNormAct2d)
    plain = convert_sync_batchnorm(nn.Sequential(plain, *pair(6, 4, norm=BatchNormAct2d)))
    assert sum(type(module) is SyncBatchNormAct for module in plain.modules()) == 2
    model = expanded_all(plain.eval(), "dbb")
    assert {type(norm) for norm in batch_norms(model)} == {nn.SyncBatchNorm}
    assert_same_function(plain, model)
    assert_comes_back(plain, model)


def test_an_activation_with_weights_is_the_trained_one():
    plain = pair(norm=lambda channels: BatchNormAct2d(channels, act_layer=nn.PReLU))
    model = trained(expanded_all(plain))
    back = contract(model)
    assert isinstance(back.norm, BatchNormAct2d)
    assert torch.equal(back.norm.act.weight, model.norm.act.weight)
    assert not torch.equal(back.norm.act.weight, plain.norm.act.weight)
    assert_comes_back(plain, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casts_after_the_expansion_hold_for_the_contracted_model(dtype):
    model = expand(net().float()).model.to(dtype)
    assert {t.dtype for t in contract(model).state_dict().values() if t.is_floating_point()} == {dtype}


def test_a_norm_in_another_dtype_keeps_it():
    plain = pair().float()
    plain.conv.bfloat16()
    back = contract(expanded_all(plain))
    assert (back.conv.weight.dtype, back.norm.weight.dtype) == (torch.bfloat16, torch.float32)


def test_what_was_not_expanded_does_not_contract():
    for model in (net(), rb.RepVGGBlock(4, 4), nn.ReLU()):
        with pytest.raises(rb.ConfigurationError, match=r"nothing in .* was expanded"):
            contract(model)


def test_half_of_a_pair_does_not_contract():
    model = expand(net(), where="first").model
    with pytest.raises(rb.ConfigurationError, match=r"the place of the BatchNorm that '0' took over"):
        contract(nn.Sequential(model.first))
    other = nn.Sequential(expand(pair()).model, model.first_norm)
    with pytest.raises(rb.ConfigurationError, match="1 had BatchNorms that blocks outside of this model took over"):
        contract(other)


def test_no_batches_are_an_error():
    with pytest.raises(rb.ConfigurationError, match="no batches"):
        contract(expand(net()).model, [])


@pytest.mark.parametrize("form", [lambda model: model, rb.deployed])
def test_weights_that_are_not_finite_are_refused_by_name(form):
    model = form(expand(net()).model.eval())
    with torch.no_grad():
        next(model.first.parameters()).view(-1)[0] = torch.inf
    with pytest.raises(rb.FoldError, match="first does not contract"):
        contract(model)


def test_a_resnet_goes_out_as_acnet_and_comes_back_as_a_resnet():
    torch.manual_seed(0)
    x = images(1, size=(33, 40))

    def resnet():
        return timm.create_model("resnet18", num_classes=10, in_chans=1)

    plain = calibrate(resnet().double(), x).float()
    model = trained(expand(plain, "acb").model, steps=2, x=x.float())
    assert sum(isinstance(module, ExpandedNorm) for module in model.modules()) == 17
    other = resnet()
    other.load_state_dict(contract(model).state_dict(), strict=True)
    assert_same_function(model, other, x.float())
    assert relative(plain(x.float()), other.eval()(x.float())) > EXACT["model"]


def test_a_norm_that_would_not_be_finite_is_refused_by_name():
    model = expand(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)), "acb").model
    batch_norms(model)[0].bias.data[0] = torch.inf
    with pytest.raises(rb.FoldError, match="0 does not contract: its weights are not finite"):
        contract(model)


def test_a_bias_is_never_dropped():
    model = expand(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), "acb", init="fresh").model
    batch_norms(model)[0].bias.data.fill_(1)
    model[0].original.conv.bias = None
    with pytest.raises(rb.FoldError, match="adds a bias, for which the original convolution has no place"):
        contract(model)


def test_batches_that_were_seen_are_counted_on():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).train()
    for _ in range(3):
        plain(torch.randn(2, 3, 8, 8))
    model = expand(plain, "acb").model.train()
    assert contract(rb.deployed(model))[1].num_batches_tracked == 3
    model(torch.randn(2, 3, 8, 8))
    assert contract(model)[1].num_batches_tracked == 4
