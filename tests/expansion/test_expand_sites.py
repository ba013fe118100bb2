"""Which convolutions are found, by the flow of data, and which are left alone, with a reason."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from expansion.expand_cases import (
    assert_comes_back,
    assert_same_function,
    assert_same_training,
    images,
    net,
    pair,
)
from support import calibrate
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations, prune

import repblocks as rb
from repblocks.expansion.expand import expand
from repblocks.expansion.expanded import ExpandedConv


class TwoPairs(nn.Module):
    """Two convolutions, two norms; subclasses say how they are called."""

    def __init__(self, **geometry):
        super().__init__()
        self.norm2 = nn.BatchNorm2d(4)
        self.norm1 = nn.BatchNorm2d(4)
        geometry = {"padding": 1, "bias": False, **geometry}
        self.conv1 = nn.Conv2d(4, 4, 3, **geometry)
        self.conv2 = nn.Conv2d(4, 4, 3, **geometry)

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


def prepared(model, x=None):
    torch.manual_seed(0)
    return calibrate(model.double(), images() if x is None else x)


def reasons(model, block="acb", **options):
    return {row.name: row.reason for row in expand(model, block, **options).report.skipped}


def expanded_pairs(model, block="acb", **options):
    return {row.name: row.norm for row in expand(model, block, **options).report.expanded}


def assert_keeps_all(plain, block="acb"):
    model = expand(plain, block).model
    assert_same_function(plain, model)
    assert_same_training(plain, model)
    assert_comes_back(plain, model)


def test_norms_are_found_by_what_they_read_not_by_registration():
    assert expanded_pairs(net()) == {"second": "second_norm", "first": "first_norm", "stem.0": "stem.1"}
    assert_keeps_all(net())


class NormTwice(TwoPairs):
    def forward(self, x):
        return self.norm1(self.conv1(x)) + self.norm1(self.conv2(x))


class ConvTwice(TwoPairs):
    def forward(self, x):
        return self.norm1(self.conv1(x)) + self.norm2(self.conv1(x + 1)) + self.conv2(x)


class OutputReadTwice(TwoPairs):
    def forward(self, x):
        x = self.conv1(x)
        return self.norm1(x) + self.norm2(self.conv2(x))


class WeightReadOutside(TwoPairs):
    def forward(self, x):
        y = F.conv2d(x, self.conv1.weight, padding=1)
        return self.norm1(self.conv1(x)) + self.norm2(self.conv2(y))


class NormOnlyInTraining(TwoPairs):
    def forward(self, x):
        x = self.conv1(x)
        return self.norm2(self.conv2(self.norm1(x) if self.training else x.relu()))


class NormOnlyInEval(TwoPairs):
    def forward(self, x):
        x = self.conv1(x)
        return self.norm2(self.conv2(x.relu() if self.training else self.norm1(x)))


class SharedWeight(TwoPairs):
    def __init__(self):
        super().__init__()
        self.conv2.weight = self.conv1.weight


class HeldInAList(TwoPairs):
    def __init__(self):
        super().__init__()
        self.layers = [self.conv1, self.norm1]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm2(self.conv2(x))


class Hooked(TwoPairs):
    def __init__(self):
        super().__init__()
        self.conv1.register_forward_hook(_doubled)


class HookedNorm(TwoPairs):
    def __init__(self):
        super().__init__()
        self.norm1.register_forward_hook(_doubled)


def _doubled(module, args, output):
    return 2 * output


class BackwardHooked(TwoPairs):
    def __init__(self):
        super().__init__()
        self.conv1.register_full_backward_hook(_nothing)


def _nothing(module, grad_input, grad_output):
    return None


class Parametrized(TwoPairs):
    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.conv1)


class Pruned(TwoPairs):
    def __init__(self):
        super().__init__()
        prune.random_unstructured(self.conv1, "weight", 0.5)


class Normalised(TwoPairs):
    def __init__(self):
        super().__init__()
        nn.utils.spectral_norm(self.conv1)


class Padded(TwoPairs):
    def __init__(self):
        super().__init__()
        self.conv1 = Conv2dSame(4, 4, 3, bias=False)


class Doubling(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


class OtherNorm(TwoPairs):
    def __init__(self):
        super().__init__()
        self.norm1 = Doubling(4)


class NoStatistics(TwoPairs):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(4, track_running_stats=False)


class Uncalled(TwoPairs):
    def forward(self, x):
        return self.norm2(self.conv2(x))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (NormTwice, "no BatchNorm of its own behind it"),
        (ConvTwice, "is called 2 times"),
        (OutputReadTwice, "no BatchNorm of its own behind it"),
        (WeightReadOutside, "shares its weight with other code"),
        (NormOnlyInTraining, "no BatchNorm of its own behind it"),
        (NormOnlyInEval, "no BatchNorm of its own behind it"),
        (SharedWeight, "shares its weight with other code"),
        (HeldInAList, "held outside of the tree of modules"),
        (Hooked, "carries hooks"),
        (HookedNorm, "its BatchNorm 'norm1' carries hooks"),
        (BackwardHooked, "carries hooks"),
        (Parametrized, "is parametrized"),
        (Pruned, "carries hooks"),
        (Normalised, "carries hooks"),
        (Padded, "is a Conv2dSame, which computes something else than Conv2d"),
        (OtherNorm, "no BatchNorm of its own behind it"),
        (NoStatistics, "'norm1' has no running statistics"),
        (Uncalled, "no traced code calls it"),
    ],
)
def test_what_no_block_can_stand_for_stays_with_a_reason(kind, reason):
    plain = prepared(kind())
    model, report = expand(plain)
    assert not isinstance(model.conv1, ExpandedConv)
    given = {row.name: row.reason for row in report.skipped}
    assert re.search(reason, given["conv1"]), given["conv1"]
    assert_same_function(plain, model)
    assert_same_training(plain, model)
    if report.expanded:
        assert_comes_back(plain, model)


class Branching(nn.Module):
    """Code that no symbolic trace gets through, around code that it does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        if x.mean() > 100:
            x = x - 100
        return self.norm(self.conv(self.inner(x)))


def test_modules_inside_untraceable_code_are_expanded_and_that_code_is_not():
    plain = prepared(Branching(nn.ModuleList([TwoPairs(), TwoPairs()])[0]))
    assert expanded_pairs(plain) == {"inner.conv1": "inner.norm1", "inner.conv2": "inner.norm2"}
    assert reasons(plain)["conv"].startswith("no traced code calls it; Branching cannot be traced")
    assert_keeps_all(plain)


def test_an_untraceable_module_does_not_hide_the_rest():
    plain = prepared(nn.Sequential(Branching(nn.Identity()), *pair(4, 4).children()))
    assert expanded_pairs(plain) == {"1": "2"}
    assert_keeps_all(plain)


class Choosing(TwoPairs):
    def forward(self, x, *, normed=True):
        x = self.conv1(x)
        return self.norm2(self.conv2(self.norm1(x) if normed else x))


class Caller(nn.Module):
    def __init__(self, inner, options):
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, x):
        for options in self.options:
            x = self.inner(x, **options)
        return x


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([{}], ["inner.conv2", "inner.conv1"]),
        ([{}, {}], ["inner.conv2", "inner.conv1"]),
        ([{"normed": False}], ["inner.conv2"]),
        ([{}, {"normed": False}], ["inner.conv2"]),
    ],
)
def test_a_module_that_is_called_again_is_followed_the_ways_it_is_called(options, found):
    plain = prepared(Caller(Choosing(), options))
    assert sorted(expanded_pairs(plain)) == sorted(found)
    assert_keeps_all(plain)


def test_options_in_untraceable_callers_leave_a_module_alone():
    plain = prepared(Branching(Choosing()))
    assert "with options, by code that cannot be traced" in reasons(plain)["inner.conv1"]


def test_a_hooked_container_is_entered():
    plain = prepared(nn.Sequential(TwoPairs(), nn.ReLU()))
    plain[0].register_forward_hook(_doubled)
    assert sorted(expanded_pairs(plain)) == ["0.conv1", "0.conv2"]
    assert_keeps_all(plain)


def test_a_layer_in_two_places_is_replaced_in_both():
    plain = prepared(TwoPairs())
    plain.alias = plain.conv1
    model = expand(plain).model
    assert model.alias is model.conv1
    assert isinstance(model.alias, ExpandedConv)
    assert_keeps_all(plain)


def test_a_single_convolution_is_a_model():
    plain = nn.Conv2d(4, 6, 3, padding=1).double()
    model = expand(plain, "edge").model
    assert isinstance(model, ExpandedConv)
    assert_same_function(plain, model)
    assert_comes_back(plain, model)


def test_convolutions_inside_blocks_and_over_other_dims_are_left():
    plain = prepared(nn.Sequential(rb.RepVGGBlock(4, 4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)))
    assert list(expanded_pairs(plain)) == ["1"]
    assert reasons(plain) == {}
    assert reasons(nn.Sequential(nn.Conv1d(2, 2, 3))) == {"0": "is a Conv1d; blocks are two-dimensional"}


def test_an_expanded_model_can_be_expanded_elsewhere_by_another_block():
    plain = prepared(TwoPairs())
    once = expand(plain, "acb", where="conv1").model
    twice, report = expand(once, "dbb")
    assert [row.name for row in report.expanded] == ["conv2"]
    assert not report.skipped
    assert_same_function(plain, twice)
    assert_same_training(plain, twice)
    assert_comes_back(plain, twice)


def test_tracing_leaves_nothing_in_the_model():
    class Remembering(TwoPairs):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    plain = prepared(Remembering())
    plain.last = None
    model = expand(plain).model
    assert plain.last is None
    assert model.last is None
    copy.deepcopy(model)


def test_a_callers_own_padding_and_an_unused_output_are_no_obstacle():
    class Odd(TwoPairs):
        def forward(self, x):
            self.norm2(self.conv2(x))
            return self.norm1(self.conv1(F.pad(x, (1, 0, 2, 0))))

    assert sorted(expanded_pairs(prepared(Odd()))) == ["conv1", "conv2"]
    assert_keeps_all(prepared(Odd()))
