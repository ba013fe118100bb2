import pytest
import torch
from support import randomise_batch_norms
from timm.layers import SqueezeExcite
from torch import nn

import repblocks as rb
from repblocks.blocks import options_of

CHOICES = ("auto", "always", "never")


def random(block):
    return randomise_batch_norms(block.double(), torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize("stride", [1, (1, 1)], ids=str)
def test_the_identity_branch_is_there_whether_stride_is_a_number_or_a_pair(stride):
    assert "identity" in rb.RepVGGConv(4, 4, stride=stride).branches


@pytest.mark.parametrize("change", [{"stride": 2}, {"padding": 0}, {"out_channels": 8}], ids=str)
def test_the_identity_branch_is_absent_where_shapes_differ_and_refused_where_it_is_asked_for(change):
    arguments = {"in_channels": 4, "out_channels": 4, **change}
    assert "identity" not in rb.RepVGGConv(**arguments).branches
    with pytest.raises(rb.ConfigurationError, match="no identity fits"):
        rb.RepVGGConv(**arguments, identity="always")


def test_the_identity_branch_can_be_left_out():
    assert "identity" not in rb.RepVGGConv(4, 4, identity="never").branches


@pytest.mark.parametrize("block", [rb.MobileOneConv, rb.QARepVGGConv])
def test_its_relatives_have_the_same_choice(block):
    kinds = {
        choice: any("identity" in name for name, _ in block(4, 4, identity=choice).named_modules())
        for choice in CHOICES
    }
    assert kinds == {"auto": True, "always": True, "never": False}
    with pytest.raises(rb.ConfigurationError, match="no identity fits"):
        block(4, 8, identity="always")


@pytest.mark.parametrize(
    ("name", "taken"), [("repvgg", {"identity"}), ("mobileone", {"identity", "num_conv_branches"}), ("acb", set())]
)
def test_options_reach_the_blocks_that_take_them(name, taken):
    options = {"identity": "never", "num_conv_branches": 2}
    assert options_of(name, **options) == {key: options[key] for key in taken}
    with pytest.raises(rb.ConfigurationError, match="block=no_such_block is unknown"):
        options_of("no_such_block", **options)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_folded_identity_lies_on_the_diagonal_of_each_group(groups):
    block = random(rb.RepVGGConv(8, 8, groups=groups))
    without = random(rb.RepVGGConv(8, 8, groups=groups, identity="never"))
    without.branches.load_state_dict(block.branches.state_dict(), strict=False)
    norm = block.branches["identity"]
    expected = torch.zeros(8, 8 // groups, 3, 3, dtype=torch.float64)
    channel = torch.arange(8)
    expected[channel, channel % (8 // groups), 1, 1] = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    torch.testing.assert_close(rb.fold(block).weight - rb.fold(without).weight, expected)


def test_squeeze_and_excitation_stays_between_the_sum_and_the_activation():
    block = random(rb.RepVGGBlock(8, 8, se_layer=SqueezeExcite))
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(block(x), torch.relu(block.se(block.conv(x))))
    torch.testing.assert_close(rb.deployed(block)(x), block(x), rtol=1e-12, atol=1e-12)


def test_activations_are_not_shared_between_blocks():
    first, second = rb.RepVGGBlock(4, 4), rb.RepVGGBlock(4, 4)
    assert first.act is not second.act


@pytest.mark.parametrize("name", sorted(rb.BLOCKS.keys() - {"repmixer"}))  # which keeps the map
def test_any_linear_block_takes_the_place_of_the_three_branches(name):
    block = random(rb.RepVGGBlock(4, 8, 3, stride=2, block=name, act_layer=nn.SiLU))
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    assert isinstance(block.conv, rb.BLOCKS[name])
    torch.testing.assert_close(rb.deployed(block)(x), block(x), rtol=1e-12, atol=1e-12)
