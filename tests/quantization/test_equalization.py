import json

import pytest
import torch
import torch.nn.functional as F
from support import calibrate
from torch import nn
from torch.nn.utils import parametrizations

import repblocks as rb
from repblocks.errors import VerificationError
from repblocks.quantization import equalized
from repblocks.quantization.pairs import find_pairs
from repblocks.verification import TOLERANCES

EXACT = TOLERANCES[torch.float64]["model"]
EQUALIZABLE = {
    "rb_repvgg_a0": 21,
    "rb_repvgg_cifar": 7,
    "rb_mobileone_s0": 42,
    "rb_resnet20_cifar": 9,
    "rb_vgg16_cifar": 8,
    "rb_repghostnet_050": 57,
}

SMALL = ("rb_repvgg_cifar", "rb_resnet20_cifar", "rb_repghostnet_050")


def wild(conv, seed=0):
    """Weights whose channels have very different ranges, on both sides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shape = conv.weight.shape
        rows = torch.logspace(-2, 1, shape[0])[torch.randperm(shape[0], generator=generator)]
        columns = torch.logspace(-1, 1, shape[1])[torch.randperm(shape[1], generator=generator)]
        conv.weight.copy_(torch.randn(shape, generator=generator) * rows.view(-1, 1, 1, 1) * columns.view(1, -1, 1, 1))
        if conv.bias is not None:
            conv.bias.copy_(torch.randn(shape[0], generator=generator))
    return conv


def chain(first, *between, second):
    return nn.Sequential(wild(first), *between, wild(second, 1)).double().eval()


def images(channels=6, size=(9, 11)):
    return torch.randn(3, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def relative_error(model, other, x):
    with torch.no_grad():
        return ((model(x) - other(x)).abs().max() / model(x).abs().max()).item()


@pytest.mark.parametrize(
    ("name", "by"), [*((name, "kernels") for name in EQUALIZABLE), *((name, "activations") for name in SMALL)]
)
def test_a_zoo_model_keeps_its_float_function_and_its_ranges_are_balanced(name, by):
    model = rb.create_model(name, num_classes=7).double()
    x = torch.randn(2, 3, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calibrate(model, x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copy, report = equalized(model, activations=x if by == "activations" else None)
    assert relative_error(model, copy, x) < EXACT
    assert len(report.pairs) == EQUALIZABLE[name]
    assert max(pair.imbalance_after for pair in report.pairs) < 1.01 < max(p.imbalance_before for p in report.pairs)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


CONVS = {
    "dense": (lambda: nn.Conv2d(6, 8, 3, padding=1), lambda: nn.Conv2d(8, 4, 3, padding=1)),
    "depthwise first": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: nn.Conv2d(6, 5, 1, bias=False)),
    "depthwise second": (lambda: nn.Conv2d(6, 8, 1, bias=False), lambda: nn.Conv2d(8, 8, (1, 5), groups=8)),
    "depthwise that multiplies": (lambda: nn.Conv2d(6, 4, 3), lambda: nn.Conv2d(4, 12, 3, groups=4)),
    "both grouped": (lambda: nn.Conv2d(6, 12, 3, groups=3), lambda: nn.Conv2d(12, 8, 3, groups=2)),
    "strided, dilated": (lambda: nn.Conv2d(6, 8, 3, stride=2), lambda: nn.Conv2d(8, 4, 2, dilation=2)),
    "reflecting": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
    ),
}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.2)], ids=["relu", "leaky"])
def test_every_geometry_keeps_its_function_and_ends_with_equal_ranges(kind, act):
    first, second = (make() for make in CONVS[kind])
    model = chain(first, act, second=second)
    copy, report = equalized(model)
    assert relative_error(model, copy, images()) < EXACT
    assert [(pair.first, pair.second) for pair in report.pairs] == [("0", "2")]
    rows = copy[0].weight.abs().flatten(1).amax(1)
    columns = copy[2].weight.abs().unflatten(0, (second.groups, -1)).amax((1, *range(3, 5))).flatten()
    assert rows.allclose(columns, rtol=2e-3)
    assert report.pairs[0].imbalance_before > 2


def test_ranges_become_the_geometric_mean_of_what_they_were():
    model = chain(nn.Conv2d(6, 8, 3), nn.ReLU(), second=nn.Conv2d(8, 4, 3))
    expected = (model[0].weight.abs().amax((1, 2, 3)) * model[2].weight.abs().amax((0, 2, 3))).sqrt()
    assert equalized(model).model[0].weight.abs().amax((1, 2, 3)).allclose(expected, rtol=2e-3)


def test_measured_activations_and_what_reads_them_end_with_equal_ranges():
    model, x = chain(nn.Conv2d(6, 8, 3), nn.LeakyReLU(0.9), second=nn.Conv2d(8, 4, 3)), images()
    copy = equalized(model, activations=[x[:2], x[2:] / 100]).model
    activations = copy[:2](x[:2]).abs().amax((0, 2, 3))
    assert activations.allclose(copy[2].weight.abs().amax((0, 2, 3)), rtol=2e-3)


def test_a_dead_channel_stays_as_it_is():
    model = chain(nn.Conv2d(6, 8, 3), nn.ReLU(), second=nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[0].weight[3] = 0
        model[2].weight[:, 5] = 0
    copy = equalized(model).model
    assert copy[0].bias[3] == model[0].bias[3]
    assert copy[0].weight[5].equal(model[0].weight[5])
    assert relative_error(model, copy, images()) < EXACT


class Functional(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.between = wild(nn.Conv2d(6, 8, 3)), wild(nn.Conv2d(8, 4, 3), 1), between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    "between",
    [F.relu, torch.relu, lambda x: x.relu(), lambda x: F.leaky_relu(x, 0.3), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))],
)
def test_functions_methods_and_pooling_are_passed(between):
    model = Functional(between).double().eval()
    copy, report = equalized(model)
    assert len(report.pairs) == 1
    assert relative_error(model, copy, images()) < EXACT


@pytest.mark.parametrize(
    "between",
    [
        nn.ReLU6(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Sigmoid(), nn.PReLU(8), nn.ELU(), nn.Softplus(),
        nn.BatchNorm2d(8), nn.LayerNorm([7, 9]), lambda x: x + 1, lambda x: x.clamp(0, 1), lambda x: x * x,
    ],
)  # fmt: skip
def test_other_activations_and_norms_are_refused_with_a_reason(between):
    report = equalized(Functional(between).double().eval()).report
    assert not report.pairs
    assert "no convolution, ReLU or LeakyReLU" in report.refused["first"]


class Odd(nn.Module):
    """Two convolutions with something odd about them."""

    def __init__(self, odd):
        super().__init__()
        self.first, self.second, self.odd = wild(nn.Conv2d(6, 6, 3)), wild(nn.Conv2d(6, 6, 3), 1), odd

    def forward(self, x):
        y = torch.relu(self.first(x))
        match self.odd:
            case "read twice":
                return self.second(y) + y[..., 1:-1, 1:-1]
            case "called twice":
                return self.second(self.second(y))
            case "weight read elsewhere":
                return self.second(y) * self.second.weight.abs().mean()
            case "first weight read elsewhere":
                return self.second(y) * self.first.weight.abs().mean()
            case "is the output":
                return self.second(y), y
            case _:
                return self.second(y)


def untouched(model, name):
    report = equalized(model).report
    assert not report.pairs
    return report.refused[name]


@pytest.mark.parametrize("odd", ["read twice", "is the output"])
def test_what_two_things_read_is_refused(odd):
    assert "goes to 2 places" in untouched(Odd(odd).eval(), "first")


@pytest.mark.parametrize("odd", ["called twice", "weight read elsewhere", "first weight read elsewhere"])
def test_weights_that_are_used_twice_are_refused(odd):
    assert "used more than once" in untouched(Odd(odd).eval(), "first")


def test_weights_that_two_layers_share_are_refused():
    model = Odd("").eval()
    model.second.weight = model.first.weight
    assert "used more than once" in untouched(model, "first")


@pytest.mark.parametrize("hooked", ["first", "second"])
def test_a_hooked_convolution_is_refused(hooked):
    model = Odd("").eval()
    model.get_submodule(hooked).register_forward_hook(lambda module, args, output: output + 1)
    assert "carries forward hooks" in untouched(model, "first")


def test_a_computed_weight_is_refused():
    model = Odd("").eval()
    parametrizations.weight_norm(model.second)
    assert "parametrization" in untouched(model, "first")


class Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Doubting(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize("cls", [Standardized, Doubting])
def test_a_convolution_that_computes_something_else_is_refused(cls):
    model = Odd("").eval()
    model.second = cls(6, 6, 3)
    assert untouched(model, "first")


class Untraceable(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_code_that_cannot_be_traced_separates_convolutions():
    assert "Untraceable" in untouched(Functional(Untraceable()).eval(), "first")


def test_a_model_in_train_form_is_collapsed_and_left_as_it_is():
    block = nn.Sequential(rb.RepVGGBlock(3, 8), rb.RepVGGBlock(8, 8)).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    calibrate(block, x)
    copy, report = equalized(block.train())
    assert block.training
    assert rb.form_of(block) == "train"
    assert rb.form_of(copy) == "deploy"
    assert [(pair.first, pair.second) for pair in report.pairs] == [("0.conv.conv", "1.conv.conv")]
    assert relative_error(block.eval(), copy, x) < EXACT


def test_the_report_is_json_and_says_what_was_left():
    report = equalized(chain(nn.Conv2d(6, 8, 3), nn.ReLU(), second=nn.Conv2d(8, 4, 3))).report
    assert json.loads(json.dumps(report.to_dict()))["pairs"][0]["first"] == "0"
    assert "equalized 1 pairs" in str(report)
    assert "2: goes to the output" in str(report)


def test_finding_pairs_changes_nothing():
    model = Odd("").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(find_pairs(model).found) == 1
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


class HiddenReader(Functional):
    """Its forward reads a weight by a way that tracing does not see."""

    def __init__(self):
        super().__init__(F.relu)
        self.weights = [self.first.weight]

    def forward(self, x):
        return super().forward(x) * self.weights[0].abs().mean()


def test_uses_that_tracing_does_not_see_are_found_on_images():
    model = HiddenReader().double().eval()
    with pytest.raises(VerificationError, match="the equalized model differs: relative error"):
        equalized(model, activations=images())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = (wild(nn.Conv2d(6, 6, 3, padding=1), seed) for seed in range(3))

    def forward(self, x):
        y = torch.relu(self.first(x))
        return self.last(torch.relu(self.inner(y)) + y)


def test_a_residual_sum_is_left_alone_with_the_reason_for_both_of_its_terms():
    model = Residual().double().eval()
    copy, report = equalized(model)
    assert report.refused["first"] == "goes to 2 places: Conv2d (inner), add"
    assert report.refused["inner"].startswith("goes to add, which is no convolution")
    assert all(value.equal(copy.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_chain_of_many_kinds_keeps_its_function():
    """Depthwise before pointwise and behind it, groups that differ, both activations, pooling between."""
    layers = [
        nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 12, 1), nn.LeakyReLU(0.2), nn.MaxPool2d(2),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU(inplace=True), nn.Conv2d(12, 8, 1, groups=4), nn.Dropout(),
        nn.LeakyReLU(-0.5), nn.Conv2d(8, 4, 1, groups=2),
    ]  # fmt: skip
    model = nn.Sequential(
        *(wild(layer, i) if isinstance(layer, nn.Conv2d) else layer for i, layer in enumerate(layers))
    )
    copy, report = equalized(model.double().eval())
    assert [(pair.first, pair.second) for pair in report.pairs] == [("0", "2"), ("2", "5"), ("5", "7"), ("7", "10")]
    assert relative_error(model, copy, images()) < TOLERANCES[torch.float64]["block"]


@pytest.mark.parametrize("where", ["behind the first", "around both"])
def test_a_hook_that_changes_what_is_between_is_not_skipped(where):
    first, second = wild(nn.Conv2d(6, 8, 3)), wild(nn.Conv2d(8, 4, 3), 1)
    block = nn.Sequential(first, nn.ReLU())
    (block if where == "around both" else block[1]).register_forward_hook(lambda layer, args, output: output + 1)
    model = nn.Sequential(block, second).double().eval()
    copy, report = equalized(model)
    assert not report.pairs
    assert relative_error(model, copy, images()) == 0
