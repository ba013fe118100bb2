import pytest
import torch
from support import batch_norms, randomise_batch_norms
from torch import nn

import repblocks as rb

CASES = [
    {},
    {"act_layer": None},
    {"act_layer": nn.Hardswish},
    {"kernel_size": 5},
    {"kernel_size": (2, 3)},
    {"kernel_size": 1},
    {"primary_kernel_size": 3},
    {"primary_kernel_size": 3, "stride": 2, "groups": 2},
    {"primary_kernel_size": (3, 1), "padding": 0, "stride": (1, 2)},
    {"stride": 2},
    {"dilation": 2},
    {"dilation": (3, 1), "primary_kernel_size": 3},
    {"padding_mode": "reflect"},
    {"padding_mode": "circular", "primary_kernel_size": 3},
]


def random(**options):
    block = rb.RepGhostModule(6, 8, **options).double()
    return randomise_batch_norms(block, torch.Generator().manual_seed(0)).eval()


def image(*size):
    return torch.randn(3, 6, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("size", [(7, 9), (11, 6)], ids=str)
def test_deploy_form_equals_train_form(options, size):
    block, x = random(**options), image(*size)
    before = block(x)
    assert (rb.deployed(block)(x) - before).abs().max() <= 1e-12 * before.abs().max()


@pytest.mark.parametrize("options", CASES, ids=str)
def test_deploy_form_is_two_convolutions_and_their_activations(options):
    collapsed = rb.deployed(random(**options))
    leaves = [module for module in collapsed.modules() if not list(module.children())]
    act_layer = options.get("act_layer", nn.ReLU)
    expected = [nn.Conv2d, nn.Conv2d] if act_layer is None else [nn.Conv2d, act_layer, nn.Conv2d, act_layer]
    assert [type(leaf) for leaf in leaves] == expected
    assert not batch_norms(collapsed)
    assert not list(collapsed.buffers())
    assert rb.form_of(collapsed) == "deploy"


def test_it_adds_the_normalised_features_to_what_the_depthwise_convolution_makes_of_them():
    block, x = random(), image(9, 8)
    conv, norm = block.primary.branches["kxk"]
    primary = norm(conv(x)).relu()
    depthwise, identity = block.cheap.branches["depthwise"], block.cheap.branches["identity"]
    torch.testing.assert_close(block(x), (depthwise(primary) + identity(primary)).relu(), rtol=0, atol=0)
    assert conv.kernel_size == (1, 1)
    assert depthwise[0].groups == depthwise[0].in_channels == depthwise[0].out_channels == 8


def test_without_activation_it_may_be_negative_and_its_first_part_too():
    block, x = random(act_layer=None), image(9, 8)
    assert block.primary_act is block.act is None
    primary = block.primary(x)
    assert primary.min() < 0
    torch.testing.assert_close(block(x), block.cheap(primary), rtol=0, atol=0)
    assert block(x).min() < 0


def test_activations_are_not_shared():
    block = random()
    assert block.primary_act is not block.act


def test_dilation_and_padding_mode_reach_the_depthwise_part():
    block = random(dilation=(2, 3), padding_mode="reflect")
    depthwise = block.cheap.branches["depthwise"][0]
    assert depthwise.dilation == depthwise.padding == (2, 3)
    assert depthwise.padding_mode == "reflect"
    assert block(image(9, 10)).shape == (3, 8, 9, 10)


def test_a_stride_belongs_to_the_first_convolution():
    block = random(stride=2, primary_kernel_size=3)
    assert block.primary.stride == (2, 2)
    assert block.cheap.stride == (1, 1)
    assert block(image(9, 8)).shape == (3, 8, 5, 4)


def test_a_misspelt_argument_is_named():
    with pytest.raises(rb.ConfigurationError, match="paddin"):
        rb.RepGhostModule(6, 8, paddin=1)


@pytest.mark.parametrize("options", [{}, {"act_layer": None}, {"stride": 2, "primary_kernel_size": 3}], ids=str)
def test_it_keeps_every_promise_of_a_block(options):
    torch.manual_seed(0)
    rb.check_block(rb.RepGhostModule(6, 8, **options), image(9, 12).float()).raise_if_failed()
