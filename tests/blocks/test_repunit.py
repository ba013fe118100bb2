import pytest
import torch
from support import randomise_batch_norms

import repblocks as rb


def random(block):
    return randomise_batch_norms(block.double(), torch.Generator().manual_seed(0)).eval()


def kernel_shapes(module):
    return [tuple(p.shape) for p in module.parameters() if p.ndim == 4]


def test_the_sum_form_has_seven_by_seven_one_by_five_and_three_by_one_depthwise_kernels():
    unit = rb.RepUnit(6)
    assert kernel_shapes(unit) == [(6, 1, 7, 7), (6, 1, 1, 5), (6, 1, 3, 1)]
    assert kernel_shapes(rb.deployed(unit)) == [(6, 1, 7, 7)]


def test_the_split_form_gives_each_kernel_its_part_of_the_channels_and_one_norm():
    unit = random(rb.RepUnit(11, merge="split"))
    assert kernel_shapes(unit) == [(4, 1, 7, 7), (4, 1, 5, 5), (3, 1, 3, 3)]
    x = torch.randn(2, 11, 9, 12, dtype=torch.float64)
    collapsed = rb.deployed(unit)
    assert kernel_shapes(collapsed) == [(11, 1, 7, 7)]
    torch.testing.assert_close(collapsed(x), unit(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("merge", ["sum", "split"])
def test_kernel_sizes_are_arguments(merge):
    unit = random(rb.RepUnit(6, kernel_size=9, kernel_sizes=((9, 9), (3, 5)), merge=merge, dilation=2, stride=2))
    x = torch.randn(2, 6, 23, 20, dtype=torch.float64)
    torch.testing.assert_close(rb.deployed(unit)(x), unit(x), rtol=1e-12, atol=1e-12)


def test_the_split_form_is_refused_for_dense_convolutions():
    with pytest.raises(rb.ConfigurationError, match="does not split over 3 depthwise kernels"):
        rb.RepUnit(8, groups=1, merge="split")
