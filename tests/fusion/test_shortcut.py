"""Shortcuts absorbed by dirac-expanded convs."""

import pytest
import torch
from fusion.laws import assert_same, the_shortcut_is_absorbed
from strategies import randn
from torch import nn

from repblocks.errors import FoldError
from repblocks.fusion import ELEMENTWISE, AffineConv, absorb_shortcut, fold


def keeping_grid(read: int, written: int, kernel: int = 3, **geometry) -> AffineConv:
    dilation = geometry.pop("dilation", 1)
    total = dilation * (kernel - 1)
    weight = randn(kernel, written, read // geometry.get("groups", 1), kernel, kernel)
    sides = ((total // 2, total - total // 2),) * 2
    return AffineConv(weight=weight, bias=randn(9, written), padding=sides, dilation=(dilation,) * 2, **geometry)


def test_the_repnext_block_becomes_three_convs_of_c_to_2c_to_5c_to_c():
    c = 8
    chain = (keeping_grid(c, c, 7, groups=c), keeping_grid(c, 4 * c, 1), keeping_grid(4 * c, c, 1))
    activations = (nn.Identity(), nn.GELU())
    the_shortcut_is_absorbed((chain, activations, randn(1, 2, c, 9, 8)))
    depthwise, widen, narrow = absorb_shortcut(chain, activations)
    assert (depthwise.weight.shape, depthwise.groups) == ((2 * c, 1, 7, 7), c)
    assert (widen.weight.shape, widen.groups) == ((5 * c, 2 * c, 1, 1), 1)
    assert (narrow.weight.shape, narrow.groups) == ((c, 5 * c, 1, 1), 1)
    macs = sum(conv.weight.numel() for conv in (widen, narrow)) / sum(conv.weight.numel() for conv in chain[1:])
    assert macs == pytest.approx(1.875)


def test_a_block_with_its_shortcut_and_activations_equals_plain_convs():
    body = nn.Sequential(nn.Conv2d(6, 6, 5, padding=2, groups=6), nn.Conv2d(6, 12, 1), nn.SiLU(), nn.Conv2d(12, 6, 1))
    body, x = body.double(), randn(1, 3, 6, 7, 8)
    convs = absorb_shortcut([fold(body[0]), fold(body[1]), fold(body[3])], [nn.Identity(), body[2]])
    first, second, last = (conv.to_module() for conv in convs)
    with torch.no_grad():
        assert_same(nn.functional.silu(x) + body(x), last(nn.functional.silu(second(first(x)))))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 3])
def test_a_single_conv_absorbs_the_input(groups, kernel, dilation):
    conv, x = keeping_grid(6, 6, kernel, groups=groups, dilation=dilation), randn(1, 2, 6, 11, 12)
    (absorbed,) = absorb_shortcut([conv], [])
    assert absorbed.groups == groups
    assert_same(x + conv(x), absorbed(x))


def test_without_activations_the_plain_shortcut_is_absorbed():
    chain, x = (keeping_grid(4, 6), keeping_grid(6, 4, 2)), randn(1, 2, 4, 6, 7)
    first, second = absorb_shortcut(chain, [nn.Identity()])
    assert_same(x + chain[1](chain[0](x)), second(first(x)))


@pytest.mark.parametrize(
    ("groups", "kept"),
    [((6, 6, 6), (6, 6, 6)), ((6, 3, 2), (6, 3, 2)), ((1, 4, 1), (1, 2, 1)), ((2, 12, 3), (2, 6, 3))],
)
def test_groups_are_kept_where_the_carried_channels_divide_and_merge_where_not(groups, kept):
    chain = [
        keeping_grid(read, written, groups=n)
        for (read, written), n in zip([(6, 12), (12, 12), (12, 6)], groups, strict=True)
    ]
    activations = (nn.Hardswish(), nn.LeakyReLU(0.3))
    assert tuple(conv.groups for conv in absorb_shortcut(chain, activations)) == kept
    the_shortcut_is_absorbed((chain, activations, randn(1, 2, 6, 8, 9)))


@pytest.mark.parametrize("activation", sorted(ELEMENTWISE, key=lambda cls: cls.__name__))
def test_every_activation_known_to_be_elementwise_carries_the_shortcut(activation):
    made = activation(0.1, 20.0) if activation is nn.Threshold else activation()
    chain = (keeping_grid(3, 5), keeping_grid(5, 3, 1))
    the_shortcut_is_absorbed((chain, (made,), randn(1, 2, 3, 6, 5)))


def test_one_slope_for_all_channels_is_elementwise():
    chain = (keeping_grid(3, 5), keeping_grid(5, 3, 1))
    the_shortcut_is_absorbed((chain, (nn.PReLU(init=0.4).double(),), randn(1, 2, 3, 6, 5)))


class Shifted(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + torch.arange(x.shape[1])[:, None, None]


def hooked() -> nn.Module:
    activation = nn.ReLU()
    activation.register_forward_hook(lambda *_: None)
    return activation


@pytest.mark.parametrize(
    "activation",
    [
        nn.PReLU(4),
        nn.Softmax(1),
        nn.Softmax2d(),
        nn.GLU(1),
        nn.RReLU(),
        nn.Dropout(),
        nn.BatchNorm2d(4),
        Shifted(),
        hooked(),
    ],
    ids=repr,
)
def test_an_activation_that_may_treat_channels_differently_is_refused(activation):
    chain = (keeping_grid(4, 4), keeping_grid(4, 4))
    with pytest.raises(FoldError, match="not known to act on every element and channel alike"):
        absorb_shortcut(chain, [activation])


def test_a_users_own_elementwise_activation_is_added_by_its_class():
    class Square(nn.Module):
        def forward(self, x):
            return x.square()

    chain = (keeping_grid(4, 4), keeping_grid(4, 4))
    with pytest.raises(FoldError, match="add the class to ELEMENTWISE"):
        absorb_shortcut(chain, [Square()])
    ELEMENTWISE.add(Square)
    the_shortcut_is_absorbed((chain, (Square(),), randn(1, 2, 4, 6, 5)))


@pytest.mark.parametrize(
    ("chain", "activations", "message"),
    [
        ((), (), "got 0 convolutions and 0 activations; needed one between each two"),
        ((keeping_grid(4, 4),), (nn.ReLU(),), "got 1 convolutions and 1 activations"),
        ((keeping_grid(4, 4), keeping_grid(4, 4)), (), "got 2 convolutions and 0 activations"),
        ((keeping_grid(4, 6),), (), "reads [4] and writes [6] channels"),
        ((keeping_grid(4, 6), keeping_grid(4, 4)), (nn.ReLU(),), "reads [4, 4] and writes [6, 4] channels"),
        ((keeping_grid(4, 4, stride=(2, 1)),), (), "changes the grid, so the input cannot be carried along"),
        ((AffineConv(weight=randn(1, 4, 4, 3)),), (), "changes the grid, so the input cannot be carried along"),
        ((AffineConv(weight=randn(1, 4, 4, 3), padding=((2, 1),)),), (), "changes the grid"),
    ],
)
def test_a_chain_that_cannot_carry_its_input_is_refused(chain, activations, message):
    with pytest.raises(FoldError) as raised:
        absorb_shortcut(chain, activations)
    assert message in str(raised.value)
