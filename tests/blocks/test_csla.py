"""The constant-scale linear addition, against its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repblocks as rb
from repblocks.blocks.csla import CSLAConv


def image(channels, *size):
    return torch.randn(3, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
def test_it_normalises_the_scaled_sum_of_its_branches(training):
    block, x = CSLAConv(4, 4, 3, scale=0.5, pointwise_scale=2.0).double().train(training), image(4, 9, 7)
    branches, norm = block.branches
    gamma = branches["identity"].gamma
    nn.init.normal_(gamma)
    kernels = {name: branches[name][0].weight for name in ("kxk", "pointwise")}
    total = 0.5 * F.conv2d(x, kernels["kxk"], padding=1) + 2.0 * F.conv2d(x, kernels["pointwise"])
    total = total + gamma[:, None, None] * x
    statistics = (None, None) if training else (norm.running_mean, norm.running_var)
    expected = F.batch_norm(total, *statistics, norm.weight, norm.bias, training, eps=norm.eps)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_the_scales_of_the_convolutions_are_constants_that_are_saved_and_that_of_the_identity_is_learned():
    block = CSLAConv(4, 4, scale=0.5, pointwise_scale=0.25)
    constants = {name: buffer for name, buffer in block.named_buffers() if name.endswith("gamma")}
    assert {name: buffer.unique().tolist() for name, buffer in constants.items()} == {
        "branches.0.kxk.1.gamma": [0.5],
        "branches.0.pointwise.1.gamma": [0.25],
    }
    assert constants.keys() <= block.state_dict().keys()
    assert [name for name, _ in block.named_parameters() if name.endswith("gamma")] == ["branches.0.identity.gamma"]


def test_constants_of_each_channel_come_from_a_state_dict():
    block, other = CSLAConv(4, 4).double().eval(), CSLAConv(4, 4).double().eval()
    nn.init.uniform_(block.branches[0]["kxk"][1].gamma)
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(image(4, 5, 6)), block(image(4, 5, 6)))


@pytest.mark.parametrize(
    ("arguments", "has"),
    [((4, 4), True), ((4, 6), False), ((4, 4, 3, "never"), False), ((4, 4, 3, "auto", 2), False)],
)
def test_the_identity_is_there_where_shapes_allow(arguments, has):
    reads, writes, size, identity, stride = (*arguments, *(3, "auto", 1)[len(arguments) - 2 :])
    block = CSLAConv(reads, writes, size, identity=identity, stride=stride)
    assert ("identity" in block.branches[0]) is has


def test_an_identity_that_does_not_fit_is_refused():
    with pytest.raises(rb.ConfigurationError, match="no identity fits"):
        CSLAConv(4, 6, identity="always")
