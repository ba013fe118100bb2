import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repblocks.quantization.rounding import (
    decibel,
    rounded_activations,
    rounded_as_a_whole,
    rounded_by_channel,
    sqnr_db,
)

seeds = st.integers(0, 2**31)


def kernel(seed, out_channels=5):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-3, 1, out_channels, dtype=torch.float64).view(-1, 1, 1, 1)
    return spread * torch.randn(out_channels, 3, 3, 2, generator=generator, dtype=torch.float64)


@given(seeds)
def test_each_channel_is_a_multiple_of_its_own_step_and_never_half_a_step_off(seed):
    weight = kernel(seed)
    step = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    levels = rounded_by_channel(weight) / step
    assert torch.allclose(levels, levels.round(), atol=1e-9)
    assert levels.abs().amax((1, 2, 3)).allclose(torch.full((5,), 127.0, dtype=torch.float64))
    assert ((rounded_by_channel(weight) - weight).abs() <= step * (0.5 + 1e-9)).all()


@given(seeds)
def test_one_step_for_the_whole_kernel_loses_more_where_channels_differ(seed):
    weight = kernel(seed)
    by_channel, whole = rounded_by_channel(weight), rounded_as_a_whole(weight)
    assert all(sqnr_db(w, a) >= sqnr_db(w, b) for w, a, b in zip(weight, by_channel, whole, strict=True))
    assert sqnr_db(weight[0], whole[0]) < 10 < 30 < sqnr_db(weight[0], by_channel[0])


def test_a_channel_of_zeros_stays_zero():
    weight = torch.stack([torch.zeros(4), torch.ones(4)])
    assert rounded_by_channel(weight).equal(weight)


def test_activations_keep_zero_exactly_and_are_half_a_step_off_at_most_in_their_range():
    x = torch.linspace(-1.3, 2.9, 1001, dtype=torch.float64)
    rounded = rounded_activations(x, -1.3, 2.9)
    assert (rounded - x).abs().max() <= 1.01 * 4.2 / 255  # half a step, and half a step by which zero is moved
    assert rounded_activations(torch.zeros(1), -1.3, 2.9).item() == 0
    assert rounded.unique().numel() <= 256


def test_activations_beyond_the_range_are_cut_off_and_a_range_always_reaches_zero():
    assert rounded_activations(torch.tensor([9.0, -9.0]), 1.0, 2.0).tolist() == pytest.approx([2.0, 0.0])
    assert rounded_activations(torch.tensor([0.0]), 0.0, 0.0).tolist() == [0.0]


def test_decibel_are_tenfold_logarithms_and_end_at_what_float32_tells_from_exact():
    assert decibel(100.0, 1.0) == pytest.approx(20)
    assert sqnr_db(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])) == pytest.approx(20 * math.log10(2))
    assert (decibel(1.0, 0.0), decibel(0.0, 1.0), decibel(1.0, 1e-30)) == (150.0, -150.0, 150.0)
