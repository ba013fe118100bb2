"""Values from scratch and from single modules."""

import pytest
import torch
from fusion.laws import assert_same, assert_value_is
from fusion.modules import prepared
from hypothesis import given
from hypothesis import strategies as st
from strategies import channel_counts, pools, randn, ranks, seeds
from torch import nn

from repblocks.errors import FoldError
from repblocks.fusion import (
    AffineConv,
    average,
    compose,
    dirac,
    from_batch_norm,
    from_linear,
    from_pool,
    identity,
    scale,
    to_linear,
)


def input_of(rank: int, channels: int, seed: int = 0):
    return randn(seed, 3, channels, *(5, 4, 3)[:rank])


@given(ranks, channel_counts, seeds)
def test_identity_gives_back_its_input(rank, channels, seed):
    x = input_of(rank, channels, seed)
    assert torch.equal(identity(channels, dtype=x.dtype)(x), x)


@given(ranks, channel_counts, seeds)
def test_scale_multiplies_each_channel(rank, channels, seed):
    x, gamma = input_of(rank, channels, seed), randn(seed, channels)
    assert_value_is(scale(gamma), x, gamma.reshape(-1, *(1,) * rank) * x)


def test_a_layer_scale_after_a_conv_folds_into_it():
    conv = AffineConv(weight=randn(1, 4, 3, 3, 1), bias=randn(2, 4), padding=((1, 1), (0, 0)))
    x, gamma = input_of(2, 3), randn(3, 4)
    assert_value_is(compose(conv, scale(gamma)), x, conv(x) * gamma[:, None, None])


def test_a_scale_of_another_shape_is_refused_with_the_remedy():
    with pytest.raises(FoldError, match=r"needed \[channels\]: call flatten\(\)"):
        scale(torch.ones(1, 4, 1, 1))


def test_average_is_the_mean_over_the_window():
    x = input_of(2, 3)
    assert_value_is(average(3, (2, 3), dtype=x.dtype), x, nn.AvgPool2d((2, 3), stride=1)(x))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_a_dirac_kernel_has_its_ones_on_the_diagonal_of_each_group(groups):
    conv, x = dirac(6, (5, 2), groups, dtype=torch.float64), input_of(2, 6)
    assert conv.weight.shape == (6, 6 // groups, 5, 2)
    assert torch.equal(torch.nn.init.dirac_(torch.empty(6, 6 // groups, 5, 2).double(), groups), conv.weight)
    assert torch.equal(conv(x), x)


@pytest.mark.parametrize("groups", [4, -2, 0])
def test_groups_of_a_dirac_kernel_divide_its_channels(groups):
    with pytest.raises(FoldError, match=f"groups={groups} must be positive and divide the 6 channels"):
        dirac(6, (3,), groups)


def test_values_from_scratch_are_made_on_the_device_asked_for():
    norm = nn.BatchNorm2d(4, device="meta")
    for made in (identity(4, device="meta"), dirac(4, (3, 2), device="meta"), from_batch_norm(norm, (3, 2))):
        assert made.weight.device.type == "meta"


@pytest.mark.parametrize(
    ("norm", "rank"),
    [
        (nn.BatchNorm1d(4), 0),
        (nn.BatchNorm1d(4), 1),
        (nn.BatchNorm2d(4), 2),
        (nn.BatchNorm3d(4), 3),
        (nn.SyncBatchNorm(4), 2),
        (nn.BatchNorm2d(4, affine=False), 2),
        (nn.BatchNorm2d(4, momentum=None), 2),
        (nn.BatchNorm2d(4, eps=0.1), 2),
    ],
    ids=repr,
)
def test_batch_norm_is_a_scale_and_a_shift_by_its_running_statistics(norm, rank):
    x = input_of(rank, 4)
    prepared(norm)
    assert_value_is(from_batch_norm(norm), x, norm(x).detach())


def test_the_scale_of_a_batch_norm_may_be_negative():
    norm, x = prepared(nn.BatchNorm2d(4)), input_of(2, 4)
    norm.weight.data[::2] *= -1
    assert_value_is(from_batch_norm(norm), x, norm(x).detach())


def test_batch_norm_as_a_kernel_keeps_its_dtype():
    conv = from_batch_norm(nn.BatchNorm2d(4).half(), (3, 2), groups=2)
    assert conv.weight.dtype == conv.bias.dtype == torch.float16


def test_batch_norm_is_judged_by_its_buffers_and_not_by_how_it_was_constructed():
    norm = nn.BatchNorm2d(4, track_running_stats=False).double().eval()
    norm.running_mean, norm.running_var = randn(1, 4), randn(2, 4).exp()
    x = input_of(2, 4)
    assert_value_is(from_batch_norm(norm), x, norm(x).detach())


def test_batch_norm_without_running_statistics_is_refused():
    with pytest.raises(FoldError, match=r"no running statistics.*train it with track_running_stats=True"):
        from_batch_norm(nn.BatchNorm2d(4, track_running_stats=False))


@given(pools(), st.integers(1, 3), seeds)
def test_average_pooling_is_a_depthwise_convolution(pool, channels, seed):
    rank = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}[type(pool)]
    x = randn(seed, 2, channels, *(8, 7, 6)[:rank])
    conv = from_pool(pool, channels, dtype=x.dtype)
    assert conv.groups == channels
    assert_value_is(conv, x, pool(x))


@pytest.mark.parametrize(
    ("pool", "remedy"),
    [
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), "set count_include_pad=True or padding=0"),
        (nn.AvgPool1d(3, padding=1, count_include_pad=False), "set count_include_pad=True or padding=0"),
        (nn.AvgPool2d(3, stride=2, ceil_mode=True), "set ceil_mode=False"),
        (nn.AvgPool2d(3, stride=(1, 2), ceil_mode=True), "set ceil_mode=False"),
    ],
)
def test_pooling_whose_divisor_or_windows_depend_on_the_border_is_refused(pool, remedy):
    with pytest.raises(FoldError, match=remedy):
        from_pool(pool, 4)


def test_refused_pooling_would_have_been_wrong():
    x = input_of(2, 4)
    counted = nn.AvgPool2d(3, stride=1, padding=1)
    assert not torch.allclose(counted(x), nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)(x))
    assert nn.AvgPool2d(2, ceil_mode=True)(x).shape != nn.AvgPool2d(2)(x).shape


def test_pooling_with_a_divisor_of_its_own_does_not_count_pixels():
    x = input_of(2, 4)
    pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False, divisor_override=5)
    assert_value_is(from_pool(pool, 4, dtype=x.dtype), x, pool(x))


def test_ceil_mode_without_effect_folds():
    x = input_of(2, 4)
    pool = nn.AvgPool2d(3, stride=1, padding=1, ceil_mode=True)
    assert_value_is(from_pool(pool, 4, dtype=x.dtype), x, pool(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_a_pointwise_convolution_and_back(bias):
    fc = nn.Linear(4, 6, bias=bias).double()
    x = randn(1, 3, 4)
    conv = from_linear(fc)
    assert_value_is(conv, x, fc(x).detach())
    again = to_linear(conv.promote(2))
    assert torch.equal(again.weight, fc.weight)
    assert_same(fc(x).detach(), again(x).detach())


def test_a_grouped_pointwise_convolution_is_a_block_diagonal_linear_layer():
    conv = AffineConv(weight=randn(1, 6, 2, 1, 1), bias=randn(2, 6), groups=3)
    x = randn(3, 2, 6, 4, 5)
    assert_same(conv(x).movedim(1, -1), to_linear(conv)(x.movedim(1, -1)).detach())


@pytest.mark.parametrize(
    "conv",
    [
        AffineConv(weight=torch.ones(2, 2, 1, 3)),
        AffineConv(weight=torch.ones(2, 2, 1, 1), stride=(1, 2)),
        AffineConv(weight=torch.ones(2, 2, 1, 1), padding=((0, 0), (0, 1))),
    ],
)
def test_only_a_pointwise_convolution_is_linear(conv):
    with pytest.raises(FoldError, match="only a pointwise convolution is linear"):
        to_linear(conv)
