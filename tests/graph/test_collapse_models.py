"""Models of timm, and every block of the zoo, collapsed without a word from their classes."""

import itertools

import pytest
import timm
import torch
from blocks.claims import BUILDERS, refused
from fusion.modules import prepared
from strategies import randn
from support import calibrate
from timm.utils.model import reparameterize_model
from torch import nn

import repblocks as rb
from repblocks.calibration import reestimate
from repblocks.profiling import count_ops
from repblocks.verification import TOLERANCES

TOLERANCE = TOLERANCES[torch.float64]["model"]
# The models of which timm collapses something: never more is left than it leaves.
REPARAMETERIZED = [
    "repvgg_a0", "repvgg_d2se", "mobileone_s0", "mobileone_s4", "fastvit_t8", "fastvit_sa12", "repvit_m1",
    "repghostnet_100", "levit_128s", "shvit_s1",
]  # fmt: skip
OTHERS = [
    "efficientformer_l1", "ghostnetv2_100", "inception_v3", "resnet18", "mobilenetv4_conv_small", "efficientnet_b0",
    "fasternet_t0", "starnet_s1", "convnext_tiny",
]  # fmt: skip
SIZES = {"levit_128s": 224, "efficientformer_l1": 224, "inception_v3": 107}
# With statistics of random weights these amplify the rounding of their first layer a millionfold or more.
CHAOTIC = {"repvgg_d2se": 0.1, "mobileone_s4": 0.3, "levit_128s": 0.3}


def model_and_images(name):
    torch.manual_seed(0)
    model, size = timm.create_model(name).double().eval(), SIZES.get(name, 64)
    images = randn(0, 3, 3, size, size)
    calibrate(model, images)
    if name in CHAOTIC:
        tame(model, images, CHAOTIC[name])
    return model, images


@torch.no_grad()
def tame(model, images, factor):
    """Branches that add little to their shortcut, as training leaves them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and not name.endswith("identity"):
            module.weight *= factor
    reestimate(model, images)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPARAMETERIZED + OTHERS)
def test_a_model_of_timm_collapses_to_the_same_function(name):
    model, images = model_and_images(name)
    result, report = rb.collapse(model, images)
    with torch.no_grad():
        expected, got = model(images), result(images)
    assert (expected - got).abs().max() <= TOLERANCE * expected.abs().max()
    assert report.equivalence.passed
    assert max(region.error for region in report.regions) <= TOLERANCES[torch.float64]["block"]
    assert repr(result)
    left, before = count_ops(result, images), count_ops(model, images)
    assert left.norms == 0
    assert left.convs <= before.convs
    assert rb.profile(result, images.shape[1:]).macs <= rb.profile(model, images.shape[1:]).macs
    if name in REPARAMETERIZED:
        theirs = reparameterize_model(model).double()  # what it folds it leaves in float32
        assert left.convs <= count_ops(theirs, images).convs
        assert parameters(result) <= parameters(theirs)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileone_s0", "repghostnet_100", "shvit_s1", "efficientnet_b0", "starnet_s1"])
def test_what_is_collapsed_keeps_its_class_collapses_no_further_and_exports(name, tmp_path):
    model, images = model_and_images(name)
    result, _ = rb.collapse(model, images)
    again, report = rb.collapse(result, images)
    assert isinstance(result, type(model))
    assert not report.regions
    assert again.state_dict().keys() == result.state_dict().keys()
    program = torch.export.export(result, (images,)).module()
    with torch.no_grad():
        assert rb.verify(result, program, images).passed


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        case
        for case in itertools.product(sorted(BUILDERS), ({}, {"stride": 2}, {"groups": 8}, {"padding_mode": "reflect"}))
        if not refused(case[0], (8, 8, 3), case[1])
    ],
    ids=str,
)
def test_a_block_of_the_zoo_collapses_to_one_convolution(name, geometry):
    block, images = prepared(BUILDERS[name](8, 8, 3, **geometry)), randn(1, 3, 8, 13, 11)
    result, _ = rb.collapse(block, images)
    assert count_ops(result, images) == (1, 0)
    assert rb.verify(block, result, images, scope="block").passed
    assert parameters(result) == parameters(rb.deployed(block))


@pytest.mark.parametrize(
    "make", [lambda: rb.RepVGGBlock(8, 8), lambda: rb.RepGhostModule(8, 16), lambda: rb.RepNeXtBlock(8)]
)
def test_a_composite_block_collapses_to_as_much_as_its_own_deploy_form(make):
    block, images = prepared(make()), randn(2, 3, 8, 13, 11)
    result, _ = rb.collapse(block, images)
    assert count_ops(result, images) == count_ops(rb.deployed(block), images)
    assert rb.verify(block, result, images).passed


def test_a_model_without_anything_linear_to_merge_is_copied():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    result, report = rb.collapse(model, torch.randn(1, 3, 8, 9))
    assert not report.regions
    assert result is not model
    assert rb.verify(model, result, torch.randn(1, 3, 8, 9)).relative_error == 0


@pytest.mark.slow
def test_a_chain_longer_than_pythons_stack_becomes_one_convolution():
    layers = [layer for _ in range(400) for layer in (nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight)
    model = nn.Sequential(*layers).double().eval()
    result, report = rb.collapse(model, randn(3, 2, 4, 5, 6))
    assert count_ops(result, randn(3, 2, 4, 5, 6)) == (1, 0)
    assert len(report.regions) == 1
