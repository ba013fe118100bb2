import itertools

import pytest
import torch
from support import randomise_batch_norms
from torch import nn

import repblocks as rb

FORMS = list(itertools.product(["absorb", "keep"], ["conv", "linear"]))


def random(block):
    return randomise_batch_norms(block.double(), torch.Generator().manual_seed(0)).eval()


def image(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("shortcut", "pointwise"), FORMS)
@pytest.mark.parametrize("act_layer", [nn.GELU, nn.ReLU, lambda: nn.PReLU(init=0.3)])
@pytest.mark.parametrize("geometry", [{}, {"dilation": 2}, {"kernel_size": 5, "padding_mode": "reflect"}], ids=str)
def test_deploy_form_equals_train_form(shortcut, pointwise, act_layer, geometry):
    block = random(rb.RepNeXtBlock(6, shortcut=shortcut, pointwise=pointwise, act_layer=act_layer, **geometry))
    x = image(3, 6, 13, 14)
    torch.testing.assert_close(rb.deployed(block)(x), block(x), rtol=1e-12, atol=1e-12)


def test_the_block_adds_the_activated_input():
    block = random(rb.RepNeXtBlock(4))
    x = image(2, 4, 9, 10)
    hidden = nn.functional.gelu(block.pointwise1(block.token_mixer(x)))
    torch.testing.assert_close(block(x), nn.functional.gelu(x) + block.pointwise2(hidden))


@pytest.mark.parametrize("pointwise", ["conv", "linear"])
def test_the_absorbed_form_has_the_papers_shapes_and_no_shortcut(pointwise):
    collapsed = rb.deployed(rb.RepNeXtBlock(8, pointwise=pointwise))
    depthwise, first, second = collapsed.token_mixer, collapsed.pointwise1, collapsed.pointwise2
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (8, 16, 8)
    assert first.weight.shape[:2] == (40, 16)
    assert second.weight.shape[:2] == (8, 40)
    assert type(first) is type(second) is (nn.Conv2d if pointwise == "conv" else nn.Linear)
    chain = nn.Sequential(depthwise, first, collapsed.act, second)
    if pointwise == "conv":
        x = image(2, 8, 9, 10).float()
        torch.testing.assert_close(chain(x), collapsed(x))


@pytest.mark.parametrize("pointwise", ["conv", "linear"])
def test_the_kept_form_collapses_the_token_mixer_only(pointwise):
    block = rb.RepNeXtBlock(8, shortcut="keep", pointwise=pointwise)
    collapsed = rb.deployed(block)
    assert collapsed.token_mixer.weight.shape == (8, 1, 7, 7)
    assert torch.equal(collapsed.pointwise1.weight, block.pointwise1.weight)


@pytest.mark.parametrize(("shortcut", "pointwise"), FORMS)
def test_no_drop_path_or_norm_is_left(shortcut, pointwise):
    collapsed = rb.deployed(rb.RepNeXtBlock(4, shortcut=shortcut, pointwise=pointwise, drop_path=0.2))
    assert {name for name, _ in collapsed.named_children()} == {"token_mixer", "pointwise1", "act", "pointwise2"}
    assert not list(collapsed.buffers())


def test_drop_path_drops_the_chain_and_never_the_shortcut():
    block = rb.RepNeXtBlock(4, drop_path=0.999).double().train()
    x = image(64, 4, 5, 5)
    torch.manual_seed(0)
    kept = (block(x) - nn.functional.gelu(x)).flatten(1).abs().amax(1) > 0
    assert kept.sum() < 8


def test_an_activation_that_differs_between_channels_is_refused_at_construction():
    with pytest.raises(rb.FoldError, match=r"PReLU.*keep the shortcut"):
        rb.RepNeXtBlock(4, act_layer=lambda: nn.PReLU(16))


def test_an_activation_that_differs_between_elements_is_fine_where_the_shortcut_is_kept():
    block = random(rb.RepNeXtBlock(4, expansion=1, shortcut="keep", act_layer=lambda: nn.PReLU(4)))
    x = image(2, 4, 9, 10)
    torch.testing.assert_close(rb.deployed(block)(x), block(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(rb.BLOCKS))
def test_any_linear_block_mixes_the_tokens(name):
    block = random(rb.RepNeXtBlock(4, 5, block=name))
    x = image(2, 4, 9, 10)
    torch.testing.assert_close(rb.deployed(block)(x), block(x), rtol=1e-12, atol=1e-12)
