"""Arguments that a user gets wrong are named when the block is built, and weights when they are loaded."""

import pytest
import torch
from support import randomise_batch_norms
from torch import nn

import repblocks as rb
from repblocks.models import create_model


def random(block):
    return randomise_batch_norms(block.double(), torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rb.RepNeXtBlock(4, shortcut="Keep"), "shortcut=Keep is unknown; did you mean one of: keep"),
        (lambda: rb.RepNeXtBlock(4, pointwise="Conv"), "pointwise=Conv is unknown; did you mean one of: conv"),
        (lambda: rb.RepNeXtBlock(4, groups=2), "groups=2: the token mixer is depthwise"),
        (lambda: rb.RepUnit(4, merge="cat"), "merge=cat is unknown"),
        (lambda: rb.RepUnit(2, merge="split"), "does not split over 3 depthwise kernels"),
        (lambda: rb.RepVGGConv(4, 8, identity="Always"), "identity=Always is unknown; did you mean one of: always"),
        (lambda: rb.RepVGGConv(4, 8, strides=2), "argument=strides is unknown; did you mean one of: stride"),
        (lambda: rb.ConvBN(4, 8, bias=True), "argument=bias is unknown"),
        (lambda: rb.ConvBN(4, 8, padding="sam"), "padding=sam is unknown; did you mean one of: same"),
        (lambda: create_model("rb_repnext_cifar", shortcut="kepp"), "shortcut=kepp is unknown"),
    ],
    ids=range(10),
)
def test_an_unknown_choice_or_argument_is_named(make, message):
    with pytest.raises(rb.ConfigurationError, match=message):
        make()


def test_padding_takes_the_words_of_torch():
    assert rb.RepVGGConv(4, 4, padding="same").padding == ((1, 1), (1, 1))
    assert rb.RepVGGConv(4, 4, padding="valid").padding == ((0, 0), (0, 0))


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_norm_then_convolution_pads_as_asked(padding_mode):
    block = random(rb.BNConv(4, 4, 3, stride=1, padding=1, padding_mode=padding_mode))
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    conv = block.branches[1]
    normed = nn.functional.pad(block.branches[0](x), (1, 1, 1, 1), mode=padding_mode)
    expected = nn.functional.conv2d(normed, conv.weight, conv.bias)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rb.deployed(block)(x), expected, rtol=1e-12, atol=1e-12)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([rb.RepVGGConv(4, 4), rb.RepVGGConv(4, 4)])


def test_a_module_of_the_users_may_be_called_branches():
    train, deploy = Net().eval(), rb.deployed(Net().eval())
    deploy.load_state_dict(deploy.state_dict())
    train.load_state_dict(train.state_dict())
    with pytest.raises(rb.CheckpointError, match="expects train-form weights"):
        train.load_state_dict(deploy.state_dict())
    with pytest.raises(rb.CheckpointError, match="expects deploy-form weights"):
        deploy.load_state_dict(train.state_dict())


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_a_part_of_the_weights_loads(form):
    block = rb.RepVGGBlock(4, 4, se_layer=lambda channels: nn.Conv2d(channels, channels, 1)).eval()
    block = block if form == "train" else rb.deployed(block)
    part = {key: value for key, value in block.state_dict().items() if key.startswith("se.")}
    assert not block.load_state_dict(part, strict=False).unexpected_keys


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(4, affine=False)], ids=["constants", "statistics"])
def test_branches_without_parameters_collapse(norm):
    block = random(rb.BranchConv([nn.AvgPool2d(3, 1, 1), norm], in_channels=4))
    x = torch.randn(2, 4, 6, 7)
    block = block.float()
    torch.testing.assert_close(rb.deployed(block)(x), block(x))


def test_a_module_that_is_used_beside_its_block_is_still_there_after_deploying():
    block = rb.RepNeXtBlock(4).eval()
    deploy = rb.deployed(nn.ModuleList([block, block.pointwise1]))
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(deploy[1](x), block.pointwise1(x))
    torch.testing.assert_close(deploy[0](x), block(x), rtol=1e-4, atol=1e-5)


def test_a_frozen_block_stays_frozen():
    assert not any(
        p.requires_grad for p in rb.deployed(rb.RepVGGConv(4, 4).requires_grad_(requires_grad=False)).parameters()
    )
    assert all(p.requires_grad for p in rb.deployed(rb.RepVGGConv(4, 4)).parameters())


def test_the_block_that_does_not_collapse_is_named():
    net = nn.Sequential(rb.RepVGGBlock(4, 4), rb.RepVGGBlock(4, 4)).eval()
    net[1].conv.branches["identity"].running_var[0] = torch.nan
    with pytest.raises(rb.FoldError, match=r"^1\.conv does not collapse: .*not finite"):
        rb.deployed(net)


def test_features_by_tracing_keep_their_blocks():
    features = create_model("rb_repvgg_cifar", features_only=True, feature_cls="fx").eval()
    x = torch.randn(2, 3, 32, 32)
    deploy = rb.deployed(features)
    assert rb.form_of(features) == "train"
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deploy.modules())
    for ours, theirs in zip(deploy(x), features(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
