"""Each block computes what its paper says: against timm's own block where there is one, else against the formula."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from blocks.claims import BUILDERS
from support import randomise_batch_norms
from timm.models.byobnet import MobileOneBlock
from timm.models.fastvit import RepMixer as TimmRepMixer
from timm.models.repghost import RepGhostModule as TimmRepGhostModule
from timm.models.repvit import RepVggDw
from torch import nn

import repblocks as rb


def random(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return randomise_batch_norms(module.double(), torch.Generator().manual_seed(seed)).eval()


def image(channels, *size, batch=3):
    return torch.randn(batch, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def transfer(theirs, ours, names):
    """Load our block with their weights, by pairs of their prefix and ours."""
    weights = theirs.state_dict()
    renamed = {
        ours_prefix + key.removeprefix(prefix): tensor
        for prefix, ours_prefix in names.items()
        for key, tensor in weights.items()
        if key.startswith(prefix)
    }
    assert len(renamed) == len(weights)
    ours.load_state_dict(renamed)
    return ours


def assert_same_in_every_mode(theirs, ours, x):
    """In eval and training mode, the running statistics, and the deploy form."""
    assert_same(ours(x), theirs(x))
    assert_same(rb.deployed(ours)(x), theirs(x))
    assert_same(ours.train()(x), theirs.train()(x))
    assert_same(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(("kernel_size", "stride", "groups"), [(3, 1, 6), (3, 2, 1), (1, 1, 1), (5, 2, 3)])
def test_mobileone_is_timms(kernel_size, stride, groups):
    theirs = MobileOneBlock(6, 6, kernel_size, stride, group_size=6 // groups if groups > 1 else 0, num_conv_branches=3)
    theirs.act = nn.Identity()
    ours = rb.MobileOneConv(6, 6, kernel_size, stride=stride, groups=groups, num_conv_branches=3).double().eval()
    names = {"conv_scale.conv": "branches.pointwise.0", "conv_scale.bn": "branches.pointwise.1"}
    names |= {
        f"conv_kxk.{i}.{part}.": f"branches.kxk{i}.{j}." for i in range(3) for j, part in enumerate(("conv", "bn"))
    }
    names["identity"] = "branches.identity"
    assert_same_in_every_mode(random(theirs), transfer(theirs, ours, names), image(6, 9, 11))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_repvits_token_mixer_is_timms(kernel_size):
    theirs, ours = random(RepVggDw(6, kernel_size)), rb.RepViTConv(6, kernel_size=kernel_size).double().eval()
    names = {
        "conv.c": "branches.0.kxk.0",
        "conv.bn": "branches.0.kxk.1",
        "conv1": "branches.0.pointwise",
        "bn": "branches.1",
    }
    assert_same_in_every_mode(theirs, transfer(theirs, ours, names), image(6, 9, 11))


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_repmixer_is_timms(kernel_size):
    theirs, ours = random(TimmRepMixer(6, kernel_size)), rb.RepMixer(6, kernel_size=kernel_size).double().eval()
    theirs.layer_scale.gamma.data = theirs.layer_scale.gamma.data.flatten()
    theirs.layer_scale.forward = lambda x: x * theirs.layer_scale.gamma[:, None, None]
    inner = "branches.mixed.0."
    names = {"norm.identity": f"{inner}reference.0", "mixer.identity": f"{inner}identity"}
    names |= {"mixer.conv_kxk.0.conv": f"{inner}kxk.0", "mixer.conv_kxk.0.bn": f"{inner}kxk.1"}
    names |= {"mixer.conv_scale.conv": f"{inner}pointwise.0", "mixer.conv_scale.bn": f"{inner}pointwise.1"}
    names["layer_scale"] = "branches.mixed.1"
    assert_same_in_every_mode(theirs, transfer(theirs, ours, names), image(6, 9, 11))


@pytest.mark.parametrize("relu", [True, False])
def test_repghosts_module_is_timms(relu):
    theirs = random(TimmRepGhostModule(4, 6, relu=relu))
    ours = rb.RepGhostModule(4, 6, act_layer=nn.ReLU if relu else None).double().eval()
    state = theirs.state_dict()
    ours_keys, theirs_keys = list(ours.state_dict()), [*state]
    order = {
        "primary_conv": "primary",
        "cheap_operation": "cheap.branches.depthwise",
        "fusion_bn.0": "cheap.branches.identity",
    }
    renamed = {}
    for key in theirs_keys:
        prefix = next(prefix for prefix in order if key.startswith(prefix))
        target = order[prefix] + (".branches.kxk" if prefix == "primary_conv" else "") + key.removeprefix(prefix)
        renamed[target] = state[key]
    assert set(renamed) == set(ours_keys)
    ours.load_state_dict(renamed)
    assert_same_in_every_mode(theirs, ours, image(4, 9, 11))


def test_qarepvgg_norms_the_sum():
    block, x = random(rb.QARepVGGConv(6, 6, groups=2)), image(6, 9, 11)
    branches, norm = block.branches[0], block.branches[1]
    assert_same(block(x), norm(branches["kxk"](x) + F.conv2d(x, branches["pointwise"].weight, groups=2) + x))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in branches["pointwise"].modules())


def test_dbb_is_the_sum_of_its_four_branches():
    block, x = random(rb.DBBConv(4, 6, stride=2)), image(4, 9, 12)
    kxk, average, pointwise = (block.branches[name] for name in ("kxk", "average", "pointwise"))
    first, bordered, second, last = block.branches["pointwise_kxk"]
    expected = kxk(x) + last(F.conv2d(padded_by_its_image_of_zero(bordered.norm, first(x)), second.weight, stride=2))
    expected = expected + pointwise[1](pointwise[0](x))
    before, bordered, _, last = average
    expected = expected + last(F.avg_pool2d(padded_by_its_image_of_zero(bordered.norm, before(x)), 3, 2))
    assert_same(block(x), expected)


def padded_by_its_image_of_zero(norm, x):
    border = norm(torch.zeros(1, x.shape[1], 1, 1, dtype=x.dtype))
    height, width = x.shape[2:]
    padded = border.expand(len(x), -1, height + 2, width + 2).clone()
    padded[:, :, 1:-1, 1:-1] = norm(x)
    return padded


def test_a_depthwise_dbb_averages_the_input_itself():
    block, x = random(rb.DBBConv(6, 6, groups=6)), image(6, 9, 12)
    assert set(block.branches) == {"kxk", "pointwise_kxk", "average"}
    assert_same(block.branches["average"][0](x), F.avg_pool2d(x, 3, 1, 1))
    assert block.branches["pointwise_kxk"][0].out_channels == 12


def test_dbb_starts_its_inner_pointwise_as_the_identity():
    x = image(6, 5, 5)
    assert torch.equal(rb.DBBConv(6, 6, groups=2).double().branches["pointwise_kxk"][0](x), x)


def test_large_kernel_has_a_small_one_in_its_centre():
    block, x = random(rb.LargeKernelConv(4, kernel_size=13)), image(4, 15, 17)
    large, small = block.branches["large"], block.branches["small"]
    assert (large[0].kernel_size, small[0].kernel_size, small[0].padding) == ((13, 13), (5, 5), (2, 2))
    assert_same(block(x), large(x) + small(x))
    assert rb.LargeKernelConv(4, kernel_size=3).branches["small"][0].kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("kernel_size", "smallest_dilations"), [(5, 2), (7, 3), (9, 4), (11, 5), (13, 5), (15, 5), (17, 5)]
)
def test_dilated_kernels_are_the_published_ones(kernel_size, smallest_dilations):
    block, x = random(rb.DilatedRepConv(3, kernel_size=kernel_size)), image(3, 19, 18)
    smalls = [branch for name, branch in block.branches.items() if name != "large"]
    assert len(smalls) == smallest_dilations
    assert all(max(conv.dilation) * (conv.kernel_size[0] - 1) < kernel_size for conv, _ in smalls)
    expected = block.branches["large"](x)
    for conv, norm in smalls:
        padding = conv.dilation[0] * (conv.kernel_size[0] - 1) // 2
        expected = expected + norm(F.conv2d(x, conv.weight, padding=padding, dilation=conv.dilation, groups=3))
    assert_same(block(x), expected)


def test_small_kernels_that_reach_too_far_are_refused():
    with pytest.raises(rb.ConfigurationError, match=r"must be at most 6 inside"):
        rb.DilatedRepConv(3, kernel_size=7, small=[(3, 4)])


@pytest.mark.parametrize(("chain", "shapes"), [("pointwise", [(1, 1), (5, 4), (1, 1)]), ("kernels", [(3, 3), (3, 2)])])
def test_expanded_convolutions_are_linear_chains(chain, shapes):
    block, x = random(rb.ExpandConv(4, 6, (5, 4), chain=chain, expansion=2, padding=0, groups=2)), image(4, 9, 11)
    *links, norm = block.branches
    assert [link.kernel_size for link in links[:2]] + [link.kernel_size for link in links[2:]] == shapes
    assert all(type(link) is nn.Conv2d and link.bias is None for link in links)
    expected = x
    for link in links:
        expected = F.conv2d(expected, link.weight, groups=2)
    assert_same(block(x), norm(expected))
    assert (block.kernel_size, links[0].out_channels) == ((5, 4), 8)


@pytest.mark.parametrize(
    ("chain", "stride", "kernel_size"), list(itertools.product(["pointwise", "kernels"], [1, 2], [1, 3, 6]))
)
def test_expanded_convolutions_collapse_at_the_border_too(chain, stride, kernel_size):
    block, x = (
        random(rb.ExpandConv(3, 5, kernel_size, chain=chain, stride=stride, padding_mode="reflect")),
        image(3, 9, 11),
    )
    assert_same(rb.deployed(block)(x), block(x))


def test_edge_block_is_the_papers_with_its_biases():
    """Each 1x1 of the paper has a bias and pads by it; the same function as ours with the biases moved to the end."""
    block, x = random(rb.EdgeConv(3, 4)), image(3, 8, 9)
    sobel = torch.tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=torch.float64)
    laplacian = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64)
    masks = {"sobel_x": sobel, "sobel_y": sobel.T, "laplacian": laplacian}
    bias = torch.randn(4, dtype=torch.float64)
    expected = F.conv2d(x, block.branches["kxk"].weight, block.branches["kxk"].bias, padding=1)
    first, second = block.branches["pointwise_kxk"]
    inner_bias = torch.randn(8, dtype=torch.float64)
    expected = expected + F.conv2d(padded_by(inner_bias, first(x) + inner_bias[:, None, None]), second.weight)
    for name, mask in masks.items():
        (pointwise, _), scale = block.branches[name]
        y = padded_by(bias, pointwise(x) + bias[:, None, None])
        expected = expected + F.conv2d(y, mask.expand(4, 1, 3, 3) * scale.gamma[:, None, None, None], groups=4)
    moved = torch.einsum("oihw,i->o", second.weight, inner_bias)
    assert_same(block(x) + moved[:, None, None], expected)


def padded_by(bias, x):
    return F.pad(x - bias[:, None, None], (1, 1, 1, 1)) + bias[:, None, None]


def test_orepa_runs_one_convolution_in_training_with_the_gradients_of_its_branches():
    block, x = random(rb.OREPAConv(4, 6, stride=2)).train(), image(4, 9, 11)
    squeezed, norm = block.branches
    expected = norm(squeezed.branches(x))
    expected.square().sum().backward()
    separate = {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
    block.zero_grad()
    calls = count_convolutions(lambda: block(x).square().sum().backward())
    assert calls["over the image"] == 1
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, separate[name], rtol=1e-9, atol=1e-9, msg=name)


def count_convolutions(run):
    from torch.utils._python_dispatch import TorchDispatchMode

    counts = {"over the image": 0, "over kernels": 0}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                counts["over the image" if args[0].shape[0] == 3 and args[0].shape[-1] == 11 else "over kernels"] += 1
            return func(*args, **(kwargs or {}))

    with Counting():
        run()
    return counts


def test_orepas_branches_start_at_the_published_scales():
    block = rb.OREPAConv(4, 6)
    starts = {name: branch[1].gamma[0].item() for name, branch in block.branches[0].branches.items()}
    assert starts == {
        "kxk": 0.25,
        "average": 0.25,
        "cosines": 0.0,
        "pointwise_kxk": 0.5,
        "pointwise": 1.0,
        "separable": 0.5,
    }


def test_orepas_prior_is_a_cosine_of_rising_frequency():
    prior = rb.OREPAConv(4, 6).branches[0].branches["cosines"][0][1].weight
    for channel, row, column in itertools.product(range(6), range(3), range(3)):
        frequency, at = (channel + 1, row) if channel < 3 else (channel - 2, column)
        expected = torch.cos(torch.tensor(torch.pi * (at + 0.5) * frequency / 3))
        torch.testing.assert_close(prior[channel, 0, row, column], expected)


BLOCK_FILES = [
    path for path in sorted(Path(rb.blocks.__file__).parent.glob("*.py")) if "\n@register_block" in path.read_text()
]


@pytest.mark.parametrize("path", BLOCK_FILES, ids=lambda path: path.stem)
def test_a_block_is_one_file_of_under_60_lines(path):
    assert len(path.read_text().splitlines()) < 60


def test_every_block_has_such_a_file():
    assert len(BLOCK_FILES) == len(rb.BLOCKS)
    assert set(BUILDERS) - {"branchconv"} == set(rb.BLOCKS)


@pytest.mark.parametrize("name", sorted(rb.BLOCKS))
def test_every_block_names_its_source(name):
    assert "Source:" in rb.BLOCKS[name].__doc__
