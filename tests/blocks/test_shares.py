import copy
import math

import pytest
import torch
from blocks.claims import BUILDERS
from support import randomise_batch_norms
from torch import nn

import repblocks as rb
from repblocks.blocks.base import RepConv
from repblocks.blocks.branches import conv_bn
from repblocks.blocks.layers import Constant, Squeezed
from repblocks.blocks.shares import branch_shares, has_parallel_branches
from repblocks.blocks.spec import ConvSpec
from repblocks.fusion import Concat, SplitConcat, Sum
from repblocks.fusion.containers import Branches
from repblocks.verification import TOLERANCES

WITHOUT_PARALLEL_BRANCHES = {"plain", "expand"}
exactly = {"rel": TOLERANCES[torch.float64]["block"], "abs": TOLERANCES[torch.float64]["block"]}


class Chain(RepConv):
    """A block whose train form is whatever is given."""


def random(block):
    generator = torch.Generator().manual_seed(0)
    for parameter in block.double().parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return randomise_batch_norms(block, generator)


def kernel(*modules, in_channels=None):
    return rb.fold(nn.Sequential(*copy.deepcopy(modules)).double().eval(), in_channels).promote(2).weight


def shares_of(kernels):
    norms = {name: weight.detach().norm().item() for name, weight in kernels.items()}
    return pytest.approx({name: norm / sum(norms.values()) for name, norm in norms.items()}, **exactly)


def test_a_share_is_the_norm_of_the_branchs_folded_kernel_over_all_of_them():
    block = random(rb.RepVGGConv(6, 6, (3, 5), groups=2))
    assert branch_shares(block) == shares_of({name: kernel(branch) for name, branch in block.branches.items()})


def test_a_norm_behind_the_sum_counts_for_every_branch():
    block = random(rb.QARepVGGConv(4, 4))
    branches, norm = block.branches
    assert branch_shares(block) == shares_of(
        {name: kernel(branch, norm, in_channels=4) for name, branch in branches.items()}
    )


def test_what_is_in_front_of_the_branches_counts_too():
    first = nn.Conv2d(3, 4, 1, bias=False)
    branches = {"same": nn.Identity(), "mean": nn.AvgPool2d(3, 1, 1)}
    block = random(Chain(nn.Sequential(first, Sum(branches))))
    assert branch_shares(block) == shares_of({name: kernel(first, branch) for name, branch in branches.items()})


def test_branches_squeezed_into_one_kernel_have_shares_of_it():
    block = random(rb.OREPAConv(4, 6))
    squeezed, norm = block.branches
    assert isinstance(squeezed, Squeezed)
    assert branch_shares(block) == shares_of({name: kernel(branch, norm) for name, branch in squeezed.branches.items()})


@pytest.mark.parametrize("container", ["concat", "split"])
def test_concatenated_branches_count_by_the_channels_that_they_write(container):
    spec = ConvSpec.of(4, 3, 3)
    parts = {"first": conv_bn(spec), "second": conv_bn(spec, (1, 3))}
    joined = Concat(parts) if container == "concat" else SplitConcat(parts, [4, 4])
    block = random(Chain(nn.Sequential(joined, nn.Conv2d(6, 5, 1, bias=False))))
    after = block.branches[1].weight
    kernels = {
        name: torch.einsum("oi,icyx->ocyx", after[:, at : at + 3, 0, 0], kernel(parts[name]))
        for name, at in (("first", 0), ("second", 3))
    }
    assert branch_shares(block) == shares_of(kernels)


def alone(block, name):
    """The block's kernel while the outputs of all other branches are multiplied by zero."""
    top = copy.deepcopy(block.branches).eval()
    container = next(module for module in top.modules() if isinstance(module, Branches))
    for other in container.keys() - {name}:
        container[other] = nn.Sequential(container[other], Constant(0.0))
    return rb.fold(top, block.in_channels).promote(2).weight.detach()


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - WITHOUT_PARALLEL_BRANCHES))
def test_the_kernels_of_single_branches_add_up_to_the_blocks(name):
    block = random(BUILDERS[name](6, 6, 5, groups=6))
    shares = branch_shares(block)
    kernels = {branch: alone(block, branch) for branch in shares}
    assert shares == shares_of(kernels)
    whole = rb.fold(block.eval()).weight
    assert (sum(kernels.values()) - whole).abs().max() <= TOLERANCES[torch.float64]["block"] * whole.abs().max()
    assert sum(shares.values()) == pytest.approx(1.0, **exactly)
    assert len(shares) >= 2
    assert has_parallel_branches(block)


@pytest.mark.parametrize("name", sorted(WITHOUT_PARALLEL_BRANCHES))
def test_a_chain_is_one_branch(name):
    block = random(rb.BLOCKS[name](4, 6))
    assert branch_shares(block) == {"branches": 1.0}
    assert not has_parallel_branches(block)


def test_a_deploy_form_is_one_branch():
    block = rb.deployed(random(rb.ACConv(4, 6)))
    assert branch_shares(block) == {"conv": 1.0}
    assert not has_parallel_branches(block)


def test_one_branch_in_a_sum_has_all_of_it():
    block = random(rb.BranchConv({"only": nn.Conv2d(3, 4, 3)}))
    assert branch_shares(block) == {"only": 1.0}
    assert not has_parallel_branches(block)


def test_branches_of_zeros_have_no_share():
    block = random(rb.ACConv(4, 6))
    nn.init.zeros_(block.branches["vertical"][1].weight)
    shares = branch_shares(block)
    assert shares["vertical"] == 0
    assert shares["square"] + shares["horizontal"] == pytest.approx(1.0, **exactly)
    for branch in block.branches.values():
        nn.init.zeros_(branch[1].weight)
    assert branch_shares(block) == dict.fromkeys(shares, 0.0)


def test_a_bias_does_not_count():
    block = random(rb.BranchConv({"a": nn.Conv2d(3, 4, 3, bias=True), "b": nn.Conv2d(3, 4, 3, bias=True)}))
    before = branch_shares(block)
    nn.init.constant_(block.branches["a"].bias, 100.0)
    assert branch_shares(block) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_computed_in_float64_whatever_the_weights_are(dtype):
    block = random(rb.DBBConv(4, 6, 3, stride=2)).to(dtype)
    assert branch_shares(block) == branch_shares(copy.deepcopy(block).double())


def test_training_mode_gives_the_shares_of_eval_mode_and_nothing_changes():
    block = random(rb.DBBConv(4, 6)).train()
    before, modules = copy.deepcopy(block.state_dict()), list(block.modules())
    assert branch_shares(block) == branch_shares(copy.deepcopy(block).eval())
    assert block.training
    assert list(block.modules()) == modules
    torch.testing.assert_close(block.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in block.parameters())


def test_weights_that_are_not_finite_give_shares_that_are_not():
    block = random(rb.ACConv(4, 6))
    nn.init.constant_(block.branches["square"][0].weight, math.nan)
    assert math.isnan(branch_shares(block)["square"])


def test_a_block_inside_a_branch_belongs_to_it():
    block = random(rb.BranchConv({"deep": rb.ACConv(3, 4), "flat": nn.Conv2d(3, 4, 1)}))
    assert branch_shares(block) == shares_of({name: kernel(part) for name, part in block.branches.items()})


def test_a_chain_of_zeros_still_has_all_of_it():
    block = Chain(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False)))
    nn.init.zeros_(block.branches[0].weight)
    assert branch_shares(block) == {"branches": 1.0}


def test_the_branches_of_a_block_within_a_chain_are_found():
    block = random(Chain(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), rb.ACConv(4, 4))))
    inner = block.branches[1].branches
    assert branch_shares(block) == shares_of({name: kernel(block.branches[0], inner[name]) for name in inner})


def test_a_branch_over_a_slice_reads_that_many_channels():
    branches = {"same": nn.Identity(), "wide": nn.Conv2d(4, 2, 3, padding=1, bias=False)}
    block = random(Chain(SplitConcat(branches, (2, 4)), 6))
    wide = block.branches["wide"].weight.detach().norm().item()
    assert branch_shares(block)["same"] == pytest.approx(2**0.5 / (2**0.5 + wide), **exactly)
