"""A class's rule holds only while a module still runs that class's forward: anything else is refused, or lost."""

import pytest
import torch
from strategies import randn
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d
from torch import nn

from repblocks.errors import FoldError
from repblocks.fusion import AffineConv, Concat, Sum, fold


class Standardised(nn.Conv2d):
    """Changes what ``nn.Conv2d.forward`` calls, not the forward itself."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Called(nn.Identity):
    def __call__(self, x):
        return 2 * x


class Weighted(Sum):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Mixin:
    def forward(self, x):
        return -super().forward(x)


class Mixed(Mixin, nn.Conv2d):
    pass


@pytest.mark.parametrize(
    "module",
    [
        BatchNormAct2d(4),
        StdConv2d(4, 4, 3),
        Conv2dSame(4, 4, 3, stride=2),
        Standardised(4, 4, 1),
        Doubled(4),
        Called(),
        Weighted([nn.Identity()]),
        Residual(nn.Conv2d(4, 4, 1)),
        Mixed(4, 4, 1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_subclass_with_its_own_forward_is_not_folded_as_its_base_class(module):
    name = type(module).__name__
    for wrapped in (module, nn.Sequential(module), Sum([nn.Conv2d(4, 4, 1), module])):
        with pytest.raises(FoldError, match=rf"{name} overrides .*register its own rule.*{name}"):
            fold(wrapped.eval(), 4)


def test_a_rule_applies_only_to_what_keeps_the_forward_of_its_class():
    assert fold.applies_to(nn.Conv2d(4, 4, 1))
    assert not fold.applies_to(Doubled(4))
    assert not fold.applies_to(nn.ReLU())


def test_a_forward_replaced_on_the_instance_is_not_folded():
    module = nn.Conv2d(4, 4, 1)
    module.forward = lambda x: x
    with pytest.raises(FoldError, match="overrides forward of Conv2d"):
        fold(module)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 4, 1), nn.Identity(), nn.Sequential(nn.Conv2d(4, 4, 1)), Concat([nn.Conv2d(4, 4, 1)])]
)
def test_a_module_with_forward_hooks_is_refused_until_they_are_removed(module, register):
    handle = getattr(module, register)(lambda *_: None)
    with pytest.raises(FoldError, match="carries forward hooks, which folding would lose; remove them first"):
        fold(nn.Sequential(module), 4)
    handle.remove()
    assert fold(nn.Sequential(module), 4).in_channels == 4


def test_a_rule_of_its_own_folds_a_subclass_with_its_own_forward():
    class Halved(nn.Conv2d):
        def forward(self, x):
            return 0.5 * super().forward(x)

    @fold.register(Halved)
    def _(module, in_channels):
        return AffineConv(weight=0.5 * module.weight, bias=0.5 * module.bias)

    module, x = Halved(4, 2, 3).double(), randn(1, 2, 4, 5, 6)
    torch.testing.assert_close(fold(module)(x), module(x), rtol=1e-12, atol=1e-12)
