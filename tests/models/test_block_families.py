"""Every block of BLOCKS as ``block=`` of the networks that take one: trained a little, then collapsed."""

import copy

import pytest
import torch
from support import calibrate

import repblocks as rb
from repblocks.blocks.layers import FixedConv2d
from repblocks.errors import ConfigurationError
from repblocks.verification import verify

NEEDS_THE_MAP = {"repmixer"}
CASES = [("rb_repvgg_cifar", name) for name in sorted(rb.BLOCKS.keys() - NEEDS_THE_MAP)]
CASES += [("rb_repnext_cifar", name) for name in sorted(rb.BLOCKS)]


def images(dtype=torch.float64):
    return torch.randn(4, 3, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("model", "block"), CASES)
def test_a_network_of_any_block_learns_and_collapses(model, block):
    torch.manual_seed(0)
    network = rb.create_model(model, block=block, num_classes=4).double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(network(images()), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    calibrate(network, images())
    verify(network, rb.deployed(network), images()).raise_if_different("the deploy form")


@pytest.mark.parametrize("block", sorted(rb.BLOCKS))
def test_the_swapped_block_is_kept_in_files(block, tmp_path):
    network = rb.create_model("rb_repnext_cifar", block=block).eval()
    assert network.model_args["block"] == block
    rb.save(network, tmp_path / "model.safetensors")
    again = rb.load(tmp_path / "model.safetensors")
    x = images(torch.float32)
    assert torch.equal(again(x), network(x))
    deploy = copy.deepcopy(again).double()
    verify(deploy, rb.deployed(deploy), images()).raise_if_different("the deploy form of the file")


def test_a_block_that_does_not_fit_the_network_says_why():
    with pytest.raises(ConfigurationError, match="changes the shape of the map; RepMixer adds it to its input"):
        rb.create_model("rb_repvgg_cifar", block="repmixer")


@pytest.mark.parametrize("model", ["rb_repnext_cifar", "rb_repvgg_cifar"])
def test_a_network_leaves_the_fixed_filters_of_its_blocks_alone(model):
    network = rb.create_model(model, block="edge")
    filters = [module.weight for module in network.modules() if isinstance(module, FixedConv2d)]
    assert filters
    assert all(kernel.abs().sum(dim=(1, 2, 3)).eq(8).all() for kernel in filters)  # Sobel and Laplacian alike
