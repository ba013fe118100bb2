"""Multiply-accumulates, counted as torch counts FLOPs."""

import pytest
import torch
from fusion.transposed_cases import convs_with_input as transposed_with_input
from hypothesis import given
from hypothesis import strategies as st
from strategies import convs_with_input, randn
from torch.utils.flop_counter import FlopCounterMode

from repblocks.errors import FoldError
from repblocks.fusion import AffineConv, AffineConvTranspose, compose, macs, ungroup


def counted(conv, x: torch.Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        conv(x[:1])
    return counter.get_total_flops() // 2


@given(st.one_of(convs_with_input(), transposed_with_input()))
def test_macs_are_half_the_flops_that_torch_counts(case):
    conv, x = case
    assert macs(conv, x.shape[2:]) == counted(conv, x)


def test_a_map_without_spatial_dims_costs_its_weights_at_every_pixel():
    flat = AffineConv(weight=randn(1, 6, 2), groups=2)
    assert macs(flat, ()) == 12
    assert macs(flat, (5, 7)) == macs(flat.promote(2), (5, 7)) == 12 * 35


def test_a_transposed_conv_may_write_a_single_pixel():
    assert macs(AffineConvTranspose(weight=randn(1, 2, 3, 3), padding=((2, 1),)), (2,)) == 2 * 2 * 3 * 3


def test_the_cheaper_of_two_exact_forms_can_be_told():
    narrow = AffineConv(weight=randn(1, 2, 64, 3, 3))
    wide = AffineConv(weight=randn(2, 64, 2, 1, 1))
    chain = macs(narrow, (8, 8)) + macs(wide, (6, 6))
    assert macs(compose(narrow, wide), (8, 8)) > 10 * chain
    grouped = AffineConv(weight=randn(1, 6, 2, 3), groups=3)
    assert macs(ungroup(grouped, 1), (9,)) == 3 * macs(grouped, (9,))


def test_composing_keeps_groups_and_dilation_where_that_is_cheaper_than_a_dense_kernel():
    depthwise = AffineConv(weight=randn(1, 8, 1, 3, 3), dilation=(2, 2), groups=8)
    grouped = AffineConv(weight=randn(2, 8, 2, 3, 3), dilation=(4, 2), groups=4)
    merged = compose(depthwise, grouped)
    assert (merged.kernel_size, merged.dilation, merged.groups) == ((7, 5), (2, 2), 4)
    assert macs(merged, (20, 20)) == 8 * 2 * 7 * 5 * (20 - 12) * (20 - 8)


@pytest.mark.parametrize(
    ("conv", "input_size", "reason"),
    [
        (AffineConv(weight=randn(1, 2, 2, 3, 3)), (2, 5), "smaller than its kernel"),
        (AffineConv(weight=randn(1, 2, 2, 3, 3)), (5,), "one per spatial dim"),
        (AffineConv(weight=randn(1, 2, 2, 3), padding=((3, 0),), padding_mode="reflect"), (3,), "reflect padding of 3"),
        (AffineConvTranspose(weight=randn(1, 2, 2, 3)), (3, 3), "needed 1 sizes of at least 1"),
        (AffineConvTranspose(weight=randn(1, 2, 2, 3)), (0,), "needed 1 sizes of at least 1"),
        (AffineConvTranspose(weight=randn(1, 2, 2, 3), padding=((2, 2),)), (2,), "larger input or pad less"),
    ],
)
def test_a_size_on_which_the_convolution_is_not_defined_is_refused(conv, input_size, reason):
    with pytest.raises(FoldError, match=reason):
        macs(conv, input_size)
