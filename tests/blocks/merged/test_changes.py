"""What a block remembers of its choice is forgotten when what it depends on changes between two passes."""

import pytest
import torch
from blocks.claims import BUILDERS
from blocks.merged.cases import METHODS, differences, image, made, over, scales, step, stepped, training
from support import batch_norms
from torch import nn
from torch.nn.utils import parametrizations

import repblocks as rb
from repblocks.blocks.branches import conv_bn
from repblocks.blocks.layers import Constant
from repblocks.blocks.spec import ConvSpec

over_methods = pytest.mark.parametrize("method", METHODS)
PLACES = {"depthwise": over(6, 6, 3, groups=6, size=(6, 7)), "pointwise": over(6, 6, 1, size=(6, 7))}
over_places = pytest.mark.parametrize("place", PLACES)


def assert_seen(block, x, method, change):
    """The block itself, which ran before, and not a copy of it."""
    rb.set_execution(block, method)
    step(block, x)
    block.zero_grad()
    change(block)
    expected = stepped(block, x, "separate")
    scale = scales(block, x, expected)
    wrong = differences(step(block, x), expected, scale)
    assert not wrong, wrong


def first_conv(block):
    return block.branches["kxk0"][0]


CHANGES = {
    "weights loaded": lambda block: block.load_state_dict(
        {key: 1.5 * value for key, value in block.state_dict().items()}, assign=True
    ),
    "norm replaced": lambda block: block.branches["kxk0"].__setitem__(1, nn.BatchNorm2d(6, eps=0.2).double()),
    "parameter replaced": lambda block: setattr(
        first_conv(block), "weight", nn.Parameter(torch.ones_like(first_conv(block).weight))
    ),
    "parameter changed in place": lambda block: nn.init.uniform_(first_conv(block).weight),
    "branch added": lambda block: block.branches.add_module("new", nn.Identity()),
    "branch removed": lambda block: block.branches.pop("kxk1"),
    "dtype and back": lambda block: block.float().double(),
    "norm frozen": lambda block: block.branches["kxk0"][1].eval(),
    "all norms frozen": lambda block: [norm.eval() for norm in batch_norms(block)],
    "weight frozen": lambda block: first_conv(block).requires_grad_(requires_grad=False),
    "factor of a norm removed": lambda block: setattr(block.branches["kxk0"][1], "weight", None),
    "statistics removed": lambda block: [
        setattr(block.branches["kxk1"][1], name, None) for name in ("running_mean", "running_var")
    ],
    "bias added": lambda block: first_conv(block).register_parameter("bias", nn.Parameter(torch.ones(6).double())),
    "spectral norm": lambda block: parametrizations.spectral_norm(first_conv(block)),
    "weight norm": lambda block: parametrizations.weight_norm(first_conv(block)),
    "forward replaced": lambda block: setattr(block.branches["identity"], "forward", torch.sin),
    "branches replaced": lambda block: setattr(block, "branches", rb.RepVGGConv(6, 6, 1).double().branches),
}


@over_methods
@over_places
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_parts_is_seen(change, place, method):
    block, x = made(BUILDERS["mobileone"], PLACES[place]), PLACES[place].image()
    torch.manual_seed(4)
    assert_seen(block, x, method, CHANGES[change])


SETTINGS = {
    "eps": 0.3,
    "momentum": 0.7,
    "track_running_stats": False,
    "stride": (2, 1),
    "padding": (0, 1),
    "dilation": (1, 2),
    "factor": 3.0,
}


@over_methods
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("groups", [1, 4])
def test_a_change_of_settings_is_seen(setting, groups, method):
    spec = ConvSpec.of(4, 4, 3, groups=groups)
    block = training(rb.BranchConv([nn.Sequential(*conv_bn(spec), Constant(2.0))]))
    part = next(part for part in block.branches["0"] if hasattr(part, setting))
    x = image(2, 4, 7, 8)
    assert_seen(block, x, method, lambda _: setattr(part, setting, SETTINGS[setting]))


@over_methods
def test_sizes_that_come_and_go_are_each_right(method):
    block = made(BUILDERS["mobileone"], PLACES["depthwise"])
    rb.set_execution(block, method)
    for height in [*range(2, 22), 5, 2]:
        x = image(2, 6, height, 4)
        expected = stepped(block, x, "separate")["output"]
        torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


@over_methods
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["mobileone", "repvit"])
@over_places
def test_a_first_pass_without_gradients_is_no_hindrance(place, name, context, method):
    """What is made once, such as indices, is made in the first pass, wherever that is."""
    block, shape = made(BUILDERS[name], PLACES[place]), (2, 6, 13, 17 + METHODS.index(method))
    rb.set_execution(block, method)
    with context():
        block(image(*shape).detach())
    x = image(*shape)
    expected = stepped(block, x, "separate")
    wrong = differences(step(block, x), expected, scales(block, x, expected))
    assert not wrong, wrong
