"""Faults that a review of the algebra found; each gave a wrong value, or an error that helped nobody."""

import pytest
import torch
from fusion.laws import assert_same
from fusion.modules import prepared
from strategies import randn
from timm.layers import StdConv2d
from torch import nn

from repblocks.errors import FoldError
from repblocks.fusion import AffineConv, SplitConcat, Sum, absorb_shortcut, dirac, fold, from_pool, pad_kernel


class Clipped(nn.PReLU):
    def forward(self, input):
        return super().forward(input).clamp(max=1)


class NamedPool(nn.AvgPool2d):
    pass


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_batch_norm_may_lack_its_scale_or_its_shift_alone(missing):
    norm = prepared(nn.BatchNorm2d(4))
    setattr(norm, missing, None)
    x = randn(0, 3, 4, 5, 6)
    assert_same(fold(norm)(x), norm(x))


@pytest.mark.parametrize("kernel_size", [3, 1])
@pytest.mark.parametrize("last", [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)], ids=["norm", "conv"])
def test_autocast_does_not_round_the_merged_kernel(kernel_size, last):
    chain = prepared(nn.Sequential(nn.Conv2d(3, 4, kernel_size), last)).float()
    plain = fold(chain)
    with torch.autocast("cpu", torch.bfloat16):
        cast = fold(chain)
    assert torch.equal(cast.weight, plain.weight)
    assert torch.equal(cast.bias, plain.bias)


def test_a_linear_layer_beside_a_norm_of_maps_is_refused():
    with pytest.raises(FoldError, match="last dimension"):
        fold(nn.Sequential(nn.BatchNorm2d(4), nn.Linear(4, 4)).eval())


@pytest.mark.parametrize("hooked", [False, True])
def test_an_activation_with_one_slope_and_more_is_not_absorbed(hooked):
    activation = nn.PReLU() if hooked else Clipped()
    if hooked:
        activation.register_forward_hook(lambda module, inputs, output: output.clamp(max=1))
    conv = AffineConv(weight=randn(0, 4, 4, 1, 1))
    with pytest.raises(FoldError, match="hooked, or not known"):
        absorb_shortcut([conv, conv], [activation])


@pytest.mark.parametrize(
    "module", [nn.ConvTranspose2d(4, 4, 3), StdConv2d(4, 4, 3)], ids=["transposed", "standardised"]
)
def test_only_modules_that_run_a_plain_convolution_become_values(module):
    with pytest.raises(FoldError, match=r"does not run the forward of nn\.Conv"):
        AffineConv.from_module(module)


def test_complex_weights_keep_their_imaginary_part():
    conv = nn.Conv2d(2, 2, 1, dtype=torch.complex64)
    assert torch.equal(fold(conv).weight, conv.weight)


def test_a_subclass_of_a_pool_that_keeps_its_forward_folds():
    x = randn(0, 2, 3, 8, 9)
    assert_same(fold(NamedPool(2), 3).to(dtype=torch.float64)(x), NamedPool(2)(x))


def test_a_pool_with_a_divisor_of_its_own_does_not_change_at_the_border():
    pool = nn.AvgPool2d(3, padding=1, count_include_pad=False, divisor_override=5)
    x = randn(0, 2, 3, 8, 9)
    assert_same(from_pool(pool, 3, dtype=torch.float64)(x), pool(x))


def test_the_channels_of_a_split_are_known_to_its_siblings():
    split = SplitConcat([nn.Conv2d(2, 2, 1), nn.Conv2d(3, 3, 1)], (2, 3))
    module = prepared(Sum([nn.Identity(), nn.Sequential(nn.Identity(), split, nn.Conv2d(5, 5, 1))]))
    x = randn(0, 2, 5, 4, 3)
    assert_same(fold(module)(x), module(x))


@pytest.mark.parametrize(
    "geometry", [{"stride": 2}, {"padding": 1}, {"padding": (1, 1)}, {"dilation": [1, 1]}], ids=str
)
def test_geometry_that_is_no_tuple_per_dim_is_named(geometry):
    with pytest.raises(FoldError, match=f"got {next(iter(geometry))}="):
        AffineConv(weight=randn(0, 4, 4, 3, 3), **geometry)


def test_one_number_pads_a_kernel_in_every_dim():
    assert pad_kernel(AffineConv(weight=randn(0, 4, 4, 3, 1)), 5).kernel_size == (5, 5)


def test_a_dirac_kernel_has_at_least_one_group():
    with pytest.raises(FoldError, match="groups=0 must be positive"):
        dirac(4, (3, 3), 0)


def test_a_split_needs_a_width_for_each_branch():
    with pytest.raises(FoldError, match="one width for each branch"):
        SplitConcat([nn.Conv2d(2, 2, 1)], (2, 2))
