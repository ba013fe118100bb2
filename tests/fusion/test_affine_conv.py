"""The value: what it computes, refuses and shares; its way from modules and back."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from fusion.laws import assert_same, run
from hypothesis import given
from hypothesis import strategies as st
from strategies import affine_convs, conv_modules, inputs, randn, seeds, spatial_ranks
from torch import nn
from torch.utils import _pytree as pytree

from repblocks.errors import FoldError
from repblocks.fusion import AffineConv


def conv2d(**geometry) -> AffineConv:
    return AffineConv(weight=randn(1, 6, 2, 3, 2), bias=randn(2, 6), groups=2, **geometry)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(conv_modules(), seeds)
def test_from_module_computes_what_the_module_computes(module, seed):
    conv = AffineConv.from_module(module)
    x = randn(seed, 2, module.in_channels, *(max(conv.reach) + n for n in (4, 5, 7)[: conv.rank]))
    with torch.no_grad():
        assert_same(module(x), conv(x))
        assert_same(module(x), conv.to_module()(x))


@given(spatial_ranks.flatmap(lambda rank: affine_convs(rank=rank)), seeds)
def test_a_value_survives_the_way_to_a_module_and_back(conv, seed):
    symmetric = replace(conv, padding=tuple((before, before) for before, _ in conv.padding))
    again = AffineConv.from_module(symmetric.to_module())
    assert torch.equal(again.weight, symmetric.weight)
    assert (again.bias is None) == (symmetric.bias is None)
    geometry = ("stride", "padding", "dilation", "groups")
    assert all(getattr(again, name) == getattr(symmetric, name) for name in geometry)
    assert again.padding_mode == (conv.padding_mode if symmetric.pads else "zeros")


@given(st.data(), affine_convs(rank=0), st.integers(1, 3))
def test_a_map_without_spatial_dims_takes_the_rank_of_what_it_meets(data, flat, rank):
    x = data.draw(inputs((flat,), rank=rank))
    assert_same(run(flat, x), flat(x))
    assert_same(run(flat, x), flat.promote(rank)(x))
    assert_same(flat(x), flat(x.flatten(2)).reshape(len(x), flat.out_channels, *x.shape[2:]))
    assert_same(flat(x)[(..., *(0,) * rank)], flat(x[(..., *(0,) * rank)]))


def test_a_map_without_spatial_dims_becomes_a_linear_module():
    flat = AffineConv(weight=randn(1, 6, 2), bias=randn(2, 6), groups=2)
    module = flat.to_module()
    assert isinstance(module, nn.Linear)
    assert_same(run(flat, randn(3, 5, 4)), module(randn(3, 5, 4)).detach())


def test_a_value_with_spatial_dims_has_no_other_rank():
    with pytest.raises(FoldError, match=r"has 2 spatial dims; needed 1, or a map without spatial dims"):
        conv2d().promote(1)


def test_from_module_refers_to_the_live_parameters_and_to_module_copies_them():
    module = nn.Conv2d(2, 3, 3)
    conv = AffineConv.from_module(module)
    assert conv.weight is module.weight
    assert conv.bias is module.bias
    copied = conv.to_module()
    assert copied.weight is not module.weight
    assert copied.weight.data_ptr() != module.weight.data_ptr()
    assert copied.weight.is_leaf
    assert copied.weight.requires_grad


def test_a_folded_weight_in_another_memory_format_becomes_an_ordinary_module():
    module = nn.Conv2d(3, 4, (3, 1)).double().to(memory_format=torch.channels_last)
    copied = AffineConv.from_module(module).to_module()
    assert copied.weight.is_contiguous()
    assert_same(module(randn(1, 2, 3, 5, 4)).detach(), copied(randn(1, 2, 3, 5, 4)).detach())


@pytest.mark.parametrize(
    ("padding", "dilation", "kernel_size"),
    [
        pytest.param(((0, 2), (1, 1)), (1, 1), (5, 2), id="grows by taps"),
        pytest.param(((2, 0), (0, 0)), (2, 1), (4, 2), id="grows by a multiple of the dilation"),
        pytest.param(((0, 1), (0, 0)), (3, 1), (8, 2), id="densifies the dilation first"),
        pytest.param(((1, 0), (0, 0)), (3, 1), (8, 2), id="densifies it behind, too"),
    ],
)
def test_asymmetric_padding_becomes_symmetric_by_zero_taps(padding, dilation, kernel_size):
    conv = conv2d(padding=padding, dilation=dilation)
    module = conv.to_module()
    assert module.kernel_size == kernel_size
    assert module.padding == tuple(map(max, padding))
    x = randn(3, 2, 4, 9, 8)
    assert_same(run(conv, x), module(x).detach())


def test_a_value_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        conv2d().groups = 3


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, lambda conv: pickle.loads(pickle.dumps(conv))])
def test_a_value_can_be_copied_and_pickled(make):
    conv = conv2d(padding=((1, 2), (0, 1)), padding_mode="circular")
    x = randn(3, 2, 4, 7, 6)
    assert_same(conv(x), make(conv)(x))


def test_a_value_is_a_tree_of_its_tensors():
    conv = conv2d(stride=(2, 1), padding=((1, 2), (0, 1)))
    leaves, _ = pytree.tree_flatten(conv)
    assert leaves[0] is conv.weight
    assert leaves[1] is conv.bias
    doubled = pytree.tree_map(lambda tensor: 2 * tensor, conv)
    x = randn(3, 2, 4, 7, 6)
    assert_same(2 * conv(x), doubled(x))


def test_a_missing_bias_is_no_leaf():
    conv = replace(conv2d(), bias=None)
    assert pytree.tree_leaves(conv)[0] is conv.weight
    assert pytree.tree_map_only(torch.Tensor, torch.zeros_like, conv).bias is None


def test_to_changes_dtype_and_device_of_weight_and_bias():
    assert conv2d().to(dtype=torch.float16).weight.dtype == torch.float16
    assert conv2d().to(dtype=torch.float16).bias.dtype == torch.float16
    assert conv2d().to("meta").bias.device.type == "meta"


def test_a_value_shows_what_is_unusual_about_it():
    assert repr(AffineConv(weight=randn(1, 2, 3))) == "AffineConv(3->2)"
    shown = repr(conv2d(stride=(2, 1), padding=((1, 0), (0, 0)), padding_mode="reflect"))
    assert shown == (
        "AffineConv(4->6, kernel_size=(3, 2), stride=(2, 1), padding=((1, 0), (0, 0)), groups=2, "
        "padding_mode=reflect, bias)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(3)}, "needed [O, I / groups, *kernel_size]"),
        ({"weight": torch.ones(1, 1, 1, 1, 1, 1)}, "needed [O, I / groups, *kernel_size]"),
        ({"weight": torch.ones(2, 0, 3)}, "needed [O, I / groups, *kernel_size]"),
        ({"groups": 3}, "groups=3 must be positive and divide the 4 out channels"),
        ({"groups": 0}, "groups=0 must be positive"),
        ({"groups": -2}, "groups=-2 must be positive"),
        ({"bias": torch.ones(3)}, "needed (4,)"),
        ({"bias": torch.ones(4, dtype=torch.float64)}, "of the weight's torch.float32"),
        ({"stride": (1,)}, "must have 2 entries, one per spatial dim"),
        ({"padding": ((1, 1),)}, "must have 2 entries, one per spatial dim"),
        ({"dilation": (1, 1, 1)}, "must have 2 entries, one per spatial dim"),
        ({"dilation": (1, 0)}, "needs stride and dilation >= 1 and padding >= 0"),
        ({"stride": (0, 1)}, "needs stride and dilation >= 1 and padding >= 0"),
        ({"padding": ((-1, 0), (0, 0))}, "needs stride and dilation >= 1 and padding >= 0"),
        ({"padding_mode": "same"}, "needed one of zeros, reflect, replicate, circular"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(arguments, message):
    with pytest.raises(FoldError) as raised:
        AffineConv(**({"weight": torch.ones(4, 2, 3, 3)} | arguments))
    assert message in str(raised.value)


def test_an_unknown_padding_mode_of_a_module_is_refused():
    module = nn.Conv2d(2, 2, 3)
    module.padding_mode = "mirror"
    with pytest.raises(FoldError, match="padding_mode='mirror'"):
        AffineConv.from_module(module)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("kernel_size", "dilation"), [(2, 1), (4, 1), (2, 3), (3, 2), ((4, 3), (1, 2))])
def test_same_padding_is_torchs_with_the_odd_pixel_behind(kernel_size, dilation):
    module = nn.Conv2d(4, 6, kernel_size, padding="same", dilation=dilation).double()
    x = randn(3, 2, 4, 9, 8)
    assert_same(AffineConv.from_module(module)(x).detach(), module(x).detach())


def test_a_module_is_made_where_and_in_what_dtype_was_asked_for():
    conv = conv2d()
    assert conv.to_module(dtype=torch.float16).weight.dtype == torch.float16
    assert conv.to_module(dtype=torch.float16).bias.dtype == torch.float16
    assert conv.to_module(device="meta").weight.device.type == "meta"
    assert conv.to_module().weight.dtype == conv.weight.dtype


def test_padding_and_unequal_channels_are_neither_pointwise_nor_diagonal():
    point = AffineConv(weight=randn(0, 4, 1, 1, 1), groups=4)
    assert point.is_pointwise
    assert point.is_diagonal
    assert not AffineConv(weight=randn(0, 4, 1, 1, 1), groups=4, padding=((0, 1), (0, 0))).is_pointwise
    assert not AffineConv(weight=randn(0, 4, 1, 1, 1), groups=4, stride=(1, 2)).is_pointwise
    assert not AffineConv(weight=randn(0, 4, 2, 1, 1), groups=4).is_diagonal
    assert not AffineConv(weight=randn(0, 8, 1, 1, 1), groups=4).is_diagonal


def test_groups_and_a_mode_that_pads_nothing_are_shown_as_they_are():
    assert repr(AffineConv(weight=randn(0, 6, 2, 1), groups=3)) == "AffineConv(6->6, kernel_size=(1,), groups=3)"
    assert "mode" not in repr(AffineConv(weight=randn(0, 6, 2, 1), padding_mode="reflect"))


def test_properties_read_the_weight():
    conv = conv2d(dilation=(2, 3))
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.reach) == (4, 6, (3, 2), (4, 3))
    assert math.prod(conv.kernel_size) * 2 * 6 == conv.weight.numel()
