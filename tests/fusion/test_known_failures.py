"""Ways in which published re-parameterization code goes wrong without a word; here the same input comes out right."""

import pytest
import torch
from fusion.laws import assert_same
from fusion.modules import conv_norm, prepared
from strategies import randn
from torch import nn

from repblocks.errors import FoldError
from repblocks.fusion import Sum, absorb_shortcut, add, dirac, fold, identity


def assert_deploys(module: nn.Module, x: torch.Tensor) -> nn.Module:
    """The plain module made from the value computes what ``module`` computes."""
    deployed = fold(module, x.shape[1]).to_module()
    with torch.no_grad():
        assert_same(module(x), deployed(x))
    return deployed


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_bias_of_a_conv_survives_the_batch_norm_behind_it(kernel_size):
    module = prepared(conv_norm(3, 4, kernel_size))
    nn.init.constant_(module[0].bias, 5.0)
    assert_deploys(module, randn(1, 3, 3, 5, 7))


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_identity_branch_beside_a_grouped_conv_adds_the_input_once(groups):
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    deployed = assert_deploys(prepared(Sum([conv, nn.Identity(), nn.BatchNorm2d(8)])), randn(1, 3, 8, 5, 7))
    assert deployed.groups == groups


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_an_identity_kernel_mixes_no_channels(groups):
    x = randn(1, 3, 8, 5, 7)
    assert torch.equal(dirac(8, (3, 3), groups, dtype=x.dtype)(x), x)
    assert torch.equal(identity(8, dtype=x.dtype)(x), x)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_dilation_and_padding_survive_folding(dilation, padding):
    module = prepared(conv_norm(3, 4, 3, stride=2, padding=padding, dilation=dilation))
    deployed = assert_deploys(module, randn(1, 3, 3, 9, 11))
    assert (deployed.dilation, deployed.padding, deployed.stride) == ((dilation,) * 2, (padding,) * 2, (2, 2))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_the_padding_mode_survives_folding(mode):
    branches = Sum([conv_norm(3, 3, 3, padding=1, padding_mode=mode), nn.Conv2d(3, 3, 1), nn.Identity()])
    assert assert_deploys(prepared(branches), randn(1, 3, 3, 5, 7)).padding_mode == mode


def test_batch_norm_in_training_mode_does_not_fold():
    with pytest.raises(FoldError, match="call eval"):
        fold(conv_norm(3, 3, 3).train())


@pytest.mark.parametrize("between", [nn.Identity(), nn.BatchNorm2d(4)])
def test_zero_padding_behind_a_bias_does_not_fold(between):
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), between, nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(FoldError, match="zero padding after a bias is not a convolution at the border"):
        fold(chain.eval())


@pytest.mark.parametrize("kernel_size", [(1, 3), (3, 1), (1, 5), (7, 3)])
def test_a_flat_kernel_is_padded_along_its_own_axis(kernel_size):
    flat = nn.Conv2d(3, 4, kernel_size, padding=tuple(k // 2 for k in kernel_size))
    assert_deploys(prepared(Sum([flat, nn.Conv2d(3, 4, 3, padding=1)])), randn(1, 3, 3, 8, 9))


def test_folding_twice_and_training_in_between_leave_the_source_intact():
    module, x = prepared(Sum([nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Identity()])), randn(1, 3, 3, 5, 7)
    expected = module(x).detach()
    for _ in range(2):
        with torch.no_grad():
            fold(module).to_module().weight.add_(1.0)
        assert_same(expected, module(x).detach())


def test_branches_are_not_accumulated_into_a_live_parameter():
    first = nn.Conv2d(3, 3, 3, padding=1).double()
    before = first.weight.detach().clone()
    merged = add(fold(first), fold(first), identity(3))
    assert merged.weight is not first.weight
    assert torch.equal(first.weight, before)


@pytest.mark.parametrize("stride", [1, (1, 1)])
def test_a_stride_of_one_is_one_however_it_is_written(stride):
    conv = nn.Conv2d(3, 3, 3, stride=stride, padding=1)
    assert_deploys(prepared(Sum([conv, nn.BatchNorm2d(3)])), randn(1, 3, 3, 5, 7))


def test_the_activation_of_an_absorbed_shortcut_is_left_alone():
    activation = nn.PReLU(init=0.3)
    absorb_shortcut([fold(nn.Conv2d(3, 5, 1)), fold(nn.Conv2d(5, 3, 1))], [activation])
    assert activation.state_dict()["weight"].tolist() == pytest.approx([0.3])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_folded_conv_has_its_weight_and_bias_in_one_dtype(half):
    chain = nn.Sequential(nn.Conv2d(3, 4, 3).to(half), nn.BatchNorm2d(4)).eval()
    assert {parameter.dtype for parameter in fold(chain).to_module().parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in fold(chain.to(half)).to_module().parameters()} == {half}


@pytest.mark.parametrize(
    "norm",
    [
        nn.SyncBatchNorm(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.SyncBatchNorm(4, affine=False),
    ],
    ids=repr,
)
def test_batch_norm_of_every_kind_folds(norm):
    assert_deploys(prepared(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm)), randn(1, 3, 3, 5, 7))


@pytest.mark.parametrize("kernel_size", [2, 4, 5, 7, (2, 3), (4, 1), (5, 2)])
def test_kernels_that_are_even_rectangular_or_large_fold(kernel_size):
    convs = Sum([nn.Conv2d(3, 4, kernel_size, padding="valid"), nn.Conv2d(3, 4, kernel_size, bias=False)])
    assert_deploys(prepared(nn.Sequential(convs, nn.BatchNorm2d(4))), randn(1, 3, 3, 8, 9))
