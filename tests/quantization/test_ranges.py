import json

import pytest
import torch
from blocks.claims import BUILDERS
from support import calibrate, randomise_batch_norms
from torch import nn
from torch.nn.utils import parametrizations

import repblocks as rb
from repblocks.blocks.shares import branch_kernels
from repblocks.errors import NonFiniteError
from repblocks.quantization import range_report
from repblocks.quantization.rounding import rounded_activations, rounded_by_channel, sqnr_db
from repblocks.verification import TOLERANCES

EXACT = TOLERANCES[torch.float64]["block"]


def images(channels=4):
    return torch.randn(5, channels, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def block(cls=rb.RepVGGConv, **options):
    torch.manual_seed(0)
    return randomise_batch_norms(cls(4, 4, **options).double(), torch.Generator().manual_seed(1)).eval()


@pytest.mark.parametrize("cls", [rb.RepVGGConv, rb.QARepVGGConv, rb.ACConv, rb.DBBConv, rb.MobileOneConv])
def test_branch_kernels_add_up_to_the_folded_kernel(cls):
    made = block(cls)
    kernels = branch_kernels(made)
    assert set(kernels) == set(rb.branch_shares(made))
    folded = rb.fold(made).weight
    assert (sum(kernels.values()) - folded).abs().max() < EXACT * folded.abs().max()


@pytest.mark.parametrize("guilty", ["kxk", "pointwise", "identity"])
def test_the_branch_that_made_the_outlier_is_named(guilty):
    made = block()
    branch = made.branches[guilty]
    with torch.no_grad():
        if guilty == "identity":
            branch.weight[2] = 100
        else:
            branch[0].weight[2, 1, -1, -1] = -100
    [row] = range_report(nn.Sequential(made)).layers
    assert row.outlier.channel == 2
    assert row.outlier.branch == guilty
    assert row.outlier.value == pytest.approx(sum(row.outlier.branches.values()))
    assert row.name == "0"


def test_the_outlier_is_the_largest_weight_of_the_channel_with_the_smallest_other_weights():
    made = block()
    weight = rb.fold(made).weight.detach()
    [row] = range_report(nn.Sequential(made)).layers
    sizes = weight.abs().flatten(1)
    levels = (127 * sizes.median(1).values / sizes.amax(1)).tolist()
    assert row.outlier.channel == levels.index(min(levels))
    assert row.outlier.levels == pytest.approx(min(levels))
    assert weight[row.outlier.channel][row.outlier.place].item() == pytest.approx(row.outlier.value)
    assert abs(row.outlier.value) == pytest.approx(sizes[row.outlier.channel].max().item())


def test_errors_and_ranges_of_the_kernel_are_those_of_the_folded_one():
    made = block()
    weight = rb.fold(made).weight.detach()
    rounded = rounded_by_channel(weight)
    [row] = range_report(nn.Sequential(made)).layers
    assert row.sqnr_db == pytest.approx(sqnr_db(weight, rounded))
    assert row.worst_channel_sqnr_db == pytest.approx(min(map(sqnr_db, weight, rounded)))
    assert row.channel_ranges == pytest.approx(weight.abs().amax((1, 2, 3)).tolist())
    assert row.zeroed == pytest.approx((rounded == 0).double().mean().item())
    assert row.whole_sqnr_db < row.sqnr_db
    ranges = sorted(row.channel_ranges)
    assert row.spread == pytest.approx(ranges[-1] / ranges[1])  # of four, the lower of the two in the middle


def test_an_identity_of_a_channel_that_hardly_varies_swallows_the_other_weights():
    quiet, wide = block(), block()
    with torch.no_grad():
        wide.branches["identity"].running_var.fill_(1e-4)  # BatchNorm scales such a channel up a hundredfold
    rows = [range_report(nn.Sequential(each)).layers[0] for each in (quiet, wide)]
    assert rows[1].outlier.branch == "identity"
    assert rows[1].outlier.levels < 1 < rows[0].outlier.levels
    assert rows[1].zeroed > 0.5 > rows[0].zeroed


def test_a_branch_that_works_against_the_outlier_did_not_make_it():
    branches = {name: nn.Conv2d(1, 1, 1, bias=False) for name in ("against", "most", "some")}
    for conv, weight in zip(branches.values(), (-5.0, 4.0, 2.0), strict=True):
        nn.init.constant_(conv.weight, weight)
    [row] = range_report(nn.Sequential(rb.BranchConv(branches))).layers
    assert row.outlier.value == pytest.approx(1)
    assert row.outlier.branches == pytest.approx({"against": -5, "most": 4, "some": 2})
    assert row.outlier.branch == "most"


def test_an_outlier_is_measured_against_the_weights_that_are_not_zero():
    net = nn.Sequential(nn.Conv2d(1, 1, 5)).eval()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[0, 0, 2, 1:4] = torch.tensor([0.5, -1.0, 0.5])
    [row] = range_report(net).layers
    assert row.outlier.levels == pytest.approx(63.5)
    assert row.outlier.place == (0, 2, 2)
    assert row.outlier.value == -1


def test_activations_are_what_the_layer_reads_and_gives():
    made, x = block(), images()
    [row] = range_report(nn.Sequential(made), [x[:2], x[2:]]).layers
    seen = row.activations
    with torch.no_grad():
        given = made(x)
        conv = rb.deployed(made).conv
        noise = nn.functional.conv2d(x, rounded_by_channel(conv.weight) - conv.weight, padding=1)
    assert (seen.input_low, seen.input_high) == (x.min().item(), x.max().item())
    assert (seen.output_low, seen.output_high) == pytest.approx((given.min().item(), given.max().item()))
    assert seen.output_sqnr_db == pytest.approx(sqnr_db(given, given + noise))
    assert seen.largest_shift == pytest.approx((noise.mean((0, 2, 3)).abs().max() / given.std(correction=0)).item())
    rounded = rounded_activations(x, x.min().item(), x.max().item())
    assert seen.input_sqnr_db == pytest.approx(sqnr_db(x, rounded))


def test_one_channel_of_large_activations_costs_the_others_their_resolution():
    x = images()
    loud = x.clone()
    loud[:, 0] *= 100
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double().eval()
    quiet_db, loud_db = (range_report(net, each).layers[0].activations.input_sqnr_db for each in (x, loud))
    assert loud_db == pytest.approx(quiet_db, abs=6)  # of the loud channel, which hides the others in the sum
    scale = [range_report(net, each).layers[0].activations.input_high for each in (x, loud)]
    assert scale[1] > 50 * scale[0]


def test_a_deploy_model_and_plain_layers_are_reported_without_branches():
    deploy = rb.deployed(nn.Sequential(block(), nn.Flatten(), nn.Linear(4 * 48, 3).double()))
    report = range_report(deploy, images())
    assert [row.name for row in report.layers] == ["0.conv", "2"]
    assert all(row.outlier.branch is None for row in report.layers)
    assert report.images == 5


def test_without_images_only_the_kernels_are_looked_at():
    report = range_report(nn.Sequential(block()))
    assert report.images == 0
    assert report.layers[0].activations is None


def test_a_kernel_of_zeros_has_no_outlier():
    net = nn.Sequential(nn.Conv2d(3, 3, 1)).eval()
    with torch.no_grad():
        net[0].weight.zero_()
    [row] = range_report(net).layers
    assert row.outlier is None
    assert row.spread == 1
    assert str(range_report(net))


def test_a_zoo_model_is_reported_layer_by_layer_as_json_and_as_a_table():
    model = rb.create_model("rb_repvgg_cifar", num_classes=5)
    x = images(3).float()
    calibrate(model, x)
    report = range_report(model, x)
    rows = json.loads(json.dumps(report.to_dict(), allow_nan=False))["layers"]
    assert len(rows) == 9
    assert rows[0]["outlier"]["branch"] in ("kxk", "pointwise")
    lines = str(report).splitlines()
    assert len(lines) == 10
    assert len({len(line) for line in lines}) == 1
    assert rb.form_of(model) == "train"


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_block_of_the_zoo_says_which_branch_made_the_outlier(name):
    made = randomise_batch_norms(BUILDERS[name](6, 6, 3, groups=1).double(), torch.Generator().manual_seed(0)).eval()
    report = range_report(nn.Sequential(made))
    outlier, weight = report.layers[0].outlier, rb.fold(made).promote(2).weight.detach()
    scale = weight.abs().max().item()
    channel = weight[outlier.channel]
    assert outlier.value == pytest.approx(channel.flatten()[channel.abs().argmax()].item())
    if outlier.branches:
        assert outlier.branch in rb.branch_shares(made)
        assert sum(outlier.branches.values()) == pytest.approx(outlier.value, abs=EXACT * scale)
    else:
        assert len(rb.branch_shares(made)) == 1


def test_a_layer_that_gets_its_input_by_name_is_watched_too():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 2, 1).double()

        def forward(self, x):
            return self.conv(input=x)

    assert range_report(ByName().eval(), images()).layers[0].activations.input_high == images().max()


def of_branches(**weights):
    """A block of pointwise branches ``[O, 1, 1, 1]`` with these weights."""
    branches = {name: nn.Conv2d(1, len(values), 1, bias=False) for name, values in weights.items()}
    for conv, values in zip(branches.values(), weights.values(), strict=True):
        with torch.no_grad():
            conv.weight.copy_(torch.tensor(values).view(-1, 1, 1, 1))
    return nn.Sequential(rb.BranchConv(branches).double())


def test_the_branch_of_a_negative_outlier_is_the_one_that_adds_most_below_zero():
    [row] = range_report(of_branches(against=[5.0], most=[-4.0], some=[-3.0])).layers
    assert row.outlier.value == pytest.approx(-2)
    assert row.outlier.branch == "most"


def test_weights_that_branches_cancel_are_no_outlier_however_large_each_is():
    net = of_branches(one=[1000.0, 0.5], other=[-1000.0, 0.25])
    [row] = range_report(net).layers
    assert row.outlier.channel == 1
    assert row.outlier.value == pytest.approx(0.75)
    assert row.channel_ranges == pytest.approx((0, 0.75))


def test_a_block_whose_branches_cancel_altogether_has_no_outlier():
    [row] = range_report(of_branches(one=[2.0], other=[-2.0])).layers
    assert row.outlier is None
    assert row.zeroed == 0


def test_a_layer_that_is_not_called_has_no_activations():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(4, 2, 1).double(), nn.Conv2d(4, 2, 1).double()

        def forward(self, x):
            return self.used(x)

    report = range_report(Unused().eval(), images())
    assert [row.activations is None for row in report.layers] == [False, True]
    assert len({len(line) for line in str(report).splitlines()}) == 1


def test_a_layer_that_is_called_twice_is_seen_twice():
    conv = nn.Conv2d(4, 4, 1).double()
    net = nn.Sequential(conv, nn.ReLU(), conv).eval()
    [row] = range_report(net, images()).layers
    with torch.no_grad():
        first, second = conv(images()), net(images())
    assert row.activations.output_low == min(first.min().item(), second.min().item())
    assert row.activations.input_high == max(images().max().item(), first.max().item())


def test_a_layer_whose_weights_are_computed_is_no_layer_to_round():
    computed = parametrizations.weight_norm(nn.Conv2d(4, 4, 1).double())
    net = nn.Sequential(computed, nn.Conv2d(4, 4, 1).double()).eval()
    assert [row.name for row in range_report(net, images()).layers] == ["1"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_without_a_range_are_refused_by_name(value):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)).eval()
    net[1].weight.data[0, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match="the weights of '1' are NaN or infinite"):
        range_report(net)
