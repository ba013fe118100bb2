"""What stays the same when a plain model is expanded: outputs in both modes, statistics, gradients, settings."""

import copy
import itertools

import pytest
import torch
from blocks.claims import identify, refused
from expansion.expand_cases import (
    EXACT,
    Net,
    assert_comes_back,
    assert_equal,
    assert_same_function,
    assert_same_training,
    expanded_all,
    images,
    net,
    pair,
    relative,
)
from timm.layers import BatchNormAct2d
from torch import nn

import repblocks as rb
from repblocks.calibration import batch_norms, randomise
from repblocks.expansion.expand import expand
from repblocks.expansion.expanded import ExpandedConv

# Its shortcut has no BatchNorm of its own, and nothing in front of a BatchNorm takes it back.
NEVER_PRESERVED = {"repmixer"}
# A BatchNorm inside normalises what the kernel took back, by each batch.
EVAL_ONLY = {"qarepvgg", "repvit"}
PRESERVING = sorted(set(rb.BLOCKS) - NEVER_PRESERVED)
GEOMETRIES = [
    (6, 12, 3, {}),
    (6, 6, 3, {"padding": 1}),
    (6, 6, 3, {"padding": 1, "bias": True}),
    (6, 6, 3, {"stride": 2}),
    (6, 6, 1, {}),
    (6, 4, 1, {"stride": (2, 1), "padding": 0, "bias": True}),
    (6, 6, (1, 5), {"dilation": (1, 2)}),
    (6, 12, (3, 5), {"stride": (1, 2), "padding": (0, 2), "groups": 2}),
    (6, 6, 3, {"groups": 6}),
    (6, 12, 3, {"groups": 6, "dilation": 2, "bias": True}),
    (6, 6, (4, 2), {"bias": True}),
    (6, 3, 5, {"padding": 3, "padding_mode": "reflect"}),
    (6, 6, 3, {"padding": "valid", "padding_mode": "circular"}),
    (6, 6, 3, {"padding_mode": "replicate", "groups": 3}),
    (6, 6, 7, {"groups": 6}),
]
every_preserving = pytest.mark.parametrize("block", PRESERVING)


def claims(block, geometry):
    reads, writes, kernel_size, rest = geometry
    settings = {name: value for name, value in rest.items() if name != "bias"}
    return not refused(block, (reads, writes, kernel_size), {"padding": "same", **settings})


CASES = [case for case in itertools.product(PRESERVING, GEOMETRIES) if claims(*case)]


def made(geometry, **options):
    reads, writes, kernel_size, rest = geometry
    return pair(reads, writes, kernel_size, **rest, **options)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of torch, about its own convolution
@pytest.mark.parametrize(("block", "geometry"), CASES, ids=identify)
def test_every_block_takes_over_every_geometry(block, geometry):
    plain, x = made(geometry), images(6)
    model, report = expand(plain, block, where="*")
    (row,) = report.expanded
    assert row.preserves == ("eval only" if block in EVAL_ONLY else "train and eval")
    assert_same_function(plain, model, x)
    if row.preserves == "train and eval":
        assert_same_training(plain, model, x)
    assert_comes_back(plain, model, x)


@every_preserving
def test_float32_models_keep_their_function_and_dtype(block):
    plain = net().float()
    model = expanded_all(plain, block) if block != "edge" else expand(plain, block).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_function(plain, model, images().float())


@pytest.mark.parametrize("block", sorted(set(PRESERVING) - EVAL_ONLY))
def test_a_whole_model_trains_alike(block):
    plain = net(bias=True)
    model = expand(plain, block, where="*").model
    assert_same_training(plain, model)


@pytest.mark.parametrize("block", ["acb", "dbb", "repvgg", "mobileone", "largekernel", "repunit"])
def test_the_old_layers_keep_values_and_gradients(block):
    plain = net().train()
    model = expanded_all(plain, block).train()
    for other in (plain, model):
        other(images()).square().sum().backward()
    main = next(m for m in model.first.modules() if isinstance(m, nn.Sequential) and len(m) == 2)
    for old, new in ((plain.first, main[0]), (plain.first_norm, main[1])):
        for name, parameter in old.named_parameters():
            twin = new.get_parameter(name)
            assert torch.equal(parameter, twin)
            assert_equal(parameter.grad, twin.grad)
        for name, buffer in old.named_buffers():
            assert torch.equal(buffer, new.get_buffer(name)) or relative(buffer, new.get_buffer(name)) < EXACT["model"]


@pytest.mark.parametrize("block", sorted(EVAL_ONLY))
def test_a_norm_inside_expects_what_the_convolution_gives_and_passes_it_on(block):
    plain = pair(4, 4, bias=True)
    block = expanded_all(plain, block).conv.block
    inner, outer = block.branches[0]["kxk"][1], block.branches[1]
    assert_equal(torch.ones(4).double(), rb.fold(inner).weight.flatten(), "block")
    assert torch.allclose(rb.fold(inner).bias, torch.zeros(4).double(), atol=EXACT["block"])
    assert torch.equal(inner.running_var, outer.running_var)
    assert_equal(plain.norm.running_mean - plain.conv.bias.detach(), inner.running_mean)


class Unsettled(rb.ACConv):
    """A user's block whose norms do not start at 1 and 0."""

    def __init__(self, *args, **geometry):
        super().__init__(*args, **geometry)
        randomise(self, torch.Generator().manual_seed(0))


def test_what_norms_start_with_does_not_matter(monkeypatch):
    monkeypatch.setitem(rb.BLOCKS, "unsettled", Unsettled)
    plain = pair()
    model = expanded_all(plain, "unsettled")
    assert_same_function(plain, model)
    assert_same_training(plain, model)


def test_other_branches_start_at_zero_and_still_learn():
    model = expanded_all(net()).train()
    horizontal = model.first.block.branches["horizontal"]
    assert not horizontal[1].weight.any()
    assert not horizontal[1].bias.any()
    model(images()).square().sum().backward()
    assert horizontal[1].weight.grad.all()


@torch.no_grad()
@pytest.mark.parametrize("block", ["acb", "dbb", "orepa", "edge", "repnextm", "expand"])
def test_fifty_passes_without_learning_leave_no_gap_to_the_plain_model(block):
    plain = net().train()
    model = expand(plain, block, where="*").model
    untouched = copy.deepcopy(plain)
    for seed in range(50):
        batch = images(seed=seed) + 0.1 * seed
        plain(batch)
        model(batch)
    assert_same_function(plain, model)
    assert relative(untouched.eval()(images()), plain.eval()(images())) > 0.05  # the passes did move the statistics


@pytest.mark.parametrize("block", ["acb", "dbb", "orepa", "qarepvgg", "edge"])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_keep_eps_and_momentum_and_whether_they_learn(block, affine):
    def norm(channels):
        return nn.BatchNorm2d(channels, eps=0.2, momentum=0.35, affine=affine)

    plain = pair(norm=norm)
    model = expanded_all(plain, block)
    assert {(own.eps, own.momentum) for own in batch_norms(model)} == {(0.2, 0.35)}
    assert [own.affine for own in batch_norms(model)].count(False) == (not affine)
    assert_same_function(plain, model)
    assert_comes_back(plain, model)


def test_norms_with_cumulative_statistics_train_alike():
    plain = pair(norm=lambda channels: nn.BatchNorm2d(channels, momentum=None)).train()
    assert_same_training(plain, expanded_all(plain, "dbb"))


@pytest.mark.parametrize("block", ["acb", "edge", "expand"])
def test_an_activated_norm_of_timm_keeps_its_activation_in_place(block):
    plain = pair(norm=lambda channels: BatchNormAct2d(channels, act_layer=nn.PReLU))
    model = expanded_all(plain, block)
    assert [name for name, _ in model.norm.named_children()] == ["drop", "act"]
    assert not any(isinstance(norm, BatchNormAct2d) for norm in model.modules())
    assert "norm.act.weight" in model.state_dict()
    assert_same_function(plain, model)
    assert_same_training(plain, model)
    assert_comes_back(plain, model)


def test_a_synchronised_norm_stays_synchronised():
    plain = pair(norm=nn.SyncBatchNorm)
    model = expanded_all(plain, "dbb")
    assert {type(norm) for norm in batch_norms(model)} == {nn.SyncBatchNorm}
    assert len(batch_norms(model)) > 4
    assert_same_function(plain, model)
    assert_comes_back(plain, model)


def test_frozen_layers_stay_frozen_and_modes_stay_as_they_were():
    plain = net().train()
    plain.first.weight.requires_grad = False
    plain.second_norm.eval()
    plain.second_norm.weight.requires_grad = False
    model = expanded_all(plain)
    first, second = model.first.block, model.second.block
    learned = [parameter for parameter in first.parameters() if parameter.requires_grad]
    old_norm = first.branches["square"][1]
    assert [id(parameter) for parameter in learned] == [id(old_norm.weight), id(old_norm.bias)]
    assert not any(norm.training for norm in batch_norms(second))
    assert all(norm.training for norm in batch_norms(first))
    assert not second.branches["square"][1].weight.requires_grad
    assert second.branches["square"][0].weight.requires_grad


@every_preserving
def test_a_norm_whose_scale_is_zero_is_no_obstacle(block):
    plain = pair()
    with torch.no_grad():
        plain.norm.weight[::2] = 0
    model = expanded_all(plain, block)
    assert_same_function(plain, model)
    assert_comes_back(plain, model)


def test_blocks_without_norms_take_over_convolutions_without_norms():
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 5, padding="same")).double()
    model = expanded_all(plain, "edge")
    assert_same_function(plain, model)
    assert_comes_back(plain, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_expands_exactly_or_says_that_it_cannot(dtype):
    plain = pair().to(dtype)
    model = expanded_all(plain)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_same_function(copy.deepcopy(plain).double(), copy.deepcopy(model).double())
    report = expand(plain, "orepa", where="*").report
    assert [row.reason for row in report.skipped] == [
        f"{dtype} cannot hold the sum of all branches exactly; expand in float32, then convert"
    ]


def test_a_fresh_block_starts_as_itself_and_comes_back():
    plain = net()
    model, report = expand(plain, "dbb", init="fresh")
    assert {row.preserves for row in report.expanded} == {"nothing"}
    assert all(norm.weight.eq(1).all() for norm in batch_norms(model.first))
    assert relative(plain(images()), model.eval()(images())) > 0.1
    assert_comes_back(plain, model)


def test_a_fresh_block_of_another_kind_resets_the_norm_behind_it():
    plain = pair(bias=True)
    model = expanded_all(plain, "edge", init="fresh")
    assert model.conv.norm.weight.eq(1).all()
    assert not model.conv.norm.running_mean.any()
    assert_comes_back(plain, model)


def test_a_fresh_block_may_bring_norms_where_the_convolution_has_a_bias():
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)).double()
    model, report = expand(plain, "acb", init="fresh")
    assert [row.name for row in report.expanded] == ["0"]
    assert "no place for the shift of ACConv" in report.skipped[0].reason
    assert_comes_back(plain, model)


@pytest.mark.parametrize("block", ["acb", "dbb", "orepa", "edge"])
def test_an_expanded_model_deploys(block):
    plain = net()
    model = expand(plain, block).model
    deployed = rb.deployed(model)
    assert not [m for m in deployed.modules() if isinstance(m, rb.RepConv)]
    assert isinstance(deployed.first, ExpandedConv)
    assert {type(child) for child in deployed.first.children()} == {nn.Conv2d}
    assert_same_function(plain, deployed)


def test_the_model_that_is_given_stays_as_it_was():
    plain = Net().double().train()
    before = copy.deepcopy(plain.state_dict())
    expand(plain, "dbb")
    assert isinstance(plain.first, nn.Conv2d)
    assert plain.training
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in plain.state_dict().items())
