"""Blocks that can and cannot take over a convolution, whatever is inside."""

import pytest
import torch
from support import randomise_batch_norms
from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.expansion.preserve import CannotExpandError, preserve
from repblocks.fusion import Sum
from repblocks.verification import TOLERANCES

EXACT = TOLERANCES[torch.float64]["block"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def conv(in_channels, out_channels, kernel_size, *, groups=1, bias=False):
    padding = kernel_size // 2
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, groups=groups, bias=bias)


def taken_over(branches, old, norm=None):
    """What the block and the norm behind it compute, and what they are to compute, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    block = randomise_batch_norms(RepConv(branches).double(), generator).eval()
    old, norm = old.double(), norm and randomise_batch_norms(norm.double(), generator).eval()
    x = torch.randn(2, old.in_channels, 7, 6, dtype=torch.float64, generator=generator)
    wanted = old(x) if norm is None else norm(old(x))
    preserve(block, old, norm)
    return block(x) if norm is None or norm in list(block.modules()) else norm(block(x)), wanted


@pytest.mark.parametrize(
    ("branches", "old"),
    [
        (lambda: nn.Sequential(conv(3, 5, 1), conv(5, 4, 3)), lambda: conv(3, 4, 3)),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), conv(5, 4, 1)), lambda: conv(3, 4, 3, bias=True)),
        (
            lambda: nn.Sequential(
                conv(3, 4, 1), nn.Sequential(conv(4, 5, 1), conv(5, 6, 3), conv(6, 5, 1)), conv(5, 4, 1)
            ),
            lambda: conv(3, 4, 3),
        ),
        (lambda: Sum([conv(4, 4, 1, groups=2), conv(4, 4, 3, groups=2)]), lambda: conv(4, 4, 3, groups=2)),
        (lambda: Sum([conv(4, 4, 1, bias=True), conv(4, 4, 3, bias=True)]), lambda: conv(4, 4, 3, bias=True)),
        (
            lambda: Sum([nn.Sequential(conv(4, 4, 3, groups=2), conv(4, 4, 1)), conv(4, 4, 3)]),
            lambda: conv(4, 4, 3),
        ),
    ],
    ids=["narrow to wide", "wide to narrow", "nested", "groups", "biases", "the second of two"],
)
def test_a_kernel_inside_takes_over(branches, old):
    got, wanted = taken_over(branches(), old())
    assert (got - wanted).abs().max() <= EXACT * wanted.abs().max()


@pytest.mark.parametrize(
    ("branches", "old"),
    [
        (lambda: nn.Sequential(conv(4, 4, 3), nn.Conv2d(4, 4, 3, bias=False)), lambda: nn.Conv2d(4, 4, 3)),
        (lambda: nn.Sequential(conv(4, 4, 3, groups=2), conv(4, 4, 1)), lambda: conv(4, 4, 3, groups=2)),
        (lambda: nn.Sequential(conv(4, 2, 1), conv(2, 4, 3)), lambda: conv(4, 4, 3)),
        (lambda: nn.Sequential(conv(4, 2, 3), conv(2, 4, 1)), lambda: conv(4, 4, 3)),
        (lambda: Sum([conv(4, 4, 1), conv(4, 4, 3, groups=2)]), lambda: conv(4, 4, 3)),
        (lambda: nn.Sequential(conv(4, 4, 3, groups=2), conv(4, 4, 1)), lambda: conv(4, 4, 3)),
        (lambda: nn.Sequential(conv(3, 5, 1), conv(5, 4, 3)), lambda: conv(3, 4, 3, bias=True)),
        (lambda: Sum([conv(4, 4, 1, bias=True), conv(4, 4, 3)]), lambda: conv(4, 4, 3)),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=2), nn.Conv2d(5, 4, 3, bias=False)),
            lambda: nn.Conv2d(3, 4, 5, padding=2),
        ),
    ],
    ids=[
        "a 3x3 behind",
        "full behind groups",
        "bottleneck before",
        "bottleneck behind",
        "groups",
        "mixed groups",
        "no bias",
        "one bias",
        "other kernels",
    ],
)
def test_a_block_that_is_less_than_the_convolution_is_refused(branches, old):
    with pytest.raises(CannotExpandError, match="no kernel inside the block can take over"):
        taken_over(branches(), old())


def test_a_convolution_that_becomes_the_old_one_has_a_bias_of_its_own():
    old, block = conv(4, 4, 3, bias=True).double(), RepConv(conv(4, 4, 3, bias=True)).double()
    preserve(block, old, None)
    assert block.branches.bias.equal(old.bias)
    assert block.branches.bias is not old.bias


def test_a_branch_that_ends_in_a_norm_without_a_weight_cannot_be_silenced():
    branches = Sum([nn.Sequential(conv(4, 4, 3), nn.BatchNorm2d(4)), nn.BatchNorm2d(4, affine=False)])
    with pytest.raises(CannotExpandError, match="does not end in a BatchNorm"):
        taken_over(branches, conv(4, 4, 3), nn.BatchNorm2d(4))


def test_a_constant_kernel_is_not_overwritten():
    constant, learned = conv(4, 4, 3), conv(4, 4, 3)
    kernel = constant.weight.detach().double()
    del constant.weight
    constant.register_buffer("weight", kernel.clone())
    got, wanted = taken_over(Sum([constant, learned]), conv(4, 4, 3))
    assert (got - wanted).abs().max() <= EXACT * wanted.abs().max()
    assert constant.weight.equal(kernel)


def test_a_branch_of_other_groups_is_passed_over():
    grouped, full = (nn.Sequential(conv(4, 4, 3, groups=n), nn.BatchNorm2d(4)) for n in (2, 1))
    got, wanted = taken_over(Sum([grouped, full]), conv(4, 4, 3), nn.BatchNorm2d(4))
    assert (got - wanted).abs().max() <= EXACT * wanted.abs().max()


def test_a_norm_behind_takes_what_the_block_adds():
    got, wanted = taken_over(Sum([conv(4, 4, 1, bias=True), conv(4, 4, 3)]), conv(4, 4, 3), nn.BatchNorm2d(4))
    assert (got - wanted).abs().max() <= EXACT * wanted.abs().max()


def test_what_cannot_take_over_stays_as_it_was():
    branches = nn.Sequential(conv(4, 2, 1), conv(2, 4, 3)).double()
    before = [parameter.clone() for parameter in branches.parameters()]
    with pytest.raises(CannotExpandError):
        taken_over(branches, conv(4, 4, 3))
    assert all(parameter.equal(old) for parameter, old in zip(branches.parameters(), before, strict=True))
