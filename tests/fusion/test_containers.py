"""Branches side by side, as modules."""

import pytest
import torch
from strategies import randn
from torch import nn

from repblocks.errors import FoldError
from repblocks.fusion import Concat, SplitConcat, Sum


@pytest.mark.parametrize("container", [Sum, Concat])
def test_branches_are_numbered_or_named(container):
    assert list(container([nn.Identity(), nn.Identity()]).state_dict()) == []
    assert list(container([nn.Identity(), nn.Identity()])) == ["0", "1"]
    assert list(container({"3x3": nn.Conv2d(1, 1, 3), "identity": nn.Identity()})) == ["3x3", "identity"]


@pytest.mark.parametrize("make", [lambda: Sum([]), lambda: Concat({}), lambda: SplitConcat([], ())])
def test_a_container_without_branches_is_refused(make):
    with pytest.raises(FoldError, match="needs at least one branch"):
        make()


@pytest.mark.parametrize("widths", [(4,), (1, 1, 2), ()])
def test_every_branch_of_a_split_has_its_width(widths):
    with pytest.raises(FoldError, match=rf"got 2 branches and {len(widths)} widths"):
        SplitConcat([nn.Identity(), nn.Identity()], widths)


def test_sum_adds_concat_joins_and_split_concat_splits():
    x = randn(0, 2, 4, 3, 5)
    double, triple = nn.Conv2d(4, 4, 1, bias=False).double(), nn.Conv2d(4, 4, 1, bias=False).double()
    nn.init.dirac_(double.weight)
    nn.init.dirac_(triple.weight)
    double.weight.data *= 2
    triple.weight.data *= 3
    torch.testing.assert_close(Sum([double, triple, nn.Identity()])(x), 6 * x)
    torch.testing.assert_close(Concat([double, triple])(x), torch.cat([2 * x, 3 * x], dim=1))
    twice = torch.cat([x, x[:, :1]], dim=1)
    torch.testing.assert_close(SplitConcat([double, nn.Identity()], (4, 1))(twice), torch.cat([2 * x, x[:, :1]], 1))


def test_sum_leaves_the_output_of_its_first_branch_alone():
    x = randn(0, 2, 4, 3, 5)
    kept = x.clone()
    Sum([nn.Identity(), nn.Identity()])(x)
    assert torch.equal(x, kept)
