"""Plain models to expand, and what an expansion and a contraction of them must keep."""

import copy
from collections import OrderedDict

import torch
from strategies import randn
from support import calibrate
from torch import nn

from repblocks.expansion.contract import contract
from repblocks.expansion.expand import expand
from repblocks.verification import TOLERANCES

EXACT = TOLERANCES[torch.float64]


def images(channels=4, seed=1, *, batch=3, size=(11, 14)):
    return randn(seed, batch, channels, *size)


def pair(reads=4, writes=6, kernel_size=3, *, norm=nn.BatchNorm2d, **geometry):
    """A convolution and its norm with random weights and statistics."""
    torch.manual_seed(0)
    geometry = {"padding": "same" if geometry.get("stride", 1) == 1 else 1, "bias": False, **geometry}
    layers = OrderedDict(conv=nn.Conv2d(reads, writes, kernel_size, **geometry), norm=norm(writes))
    return calibrate(nn.Sequential(layers).double(), images(reads))


class Net(nn.Module):
    """Norms registered before their convolutions and in another order, a shortcut, and two sizes of map."""

    def __init__(self, norm=nn.BatchNorm2d, channels=6, **geometry):
        super().__init__()
        geometry = {"padding": 1, "bias": False, **geometry}
        self.head = nn.Linear(channels, 5)
        self.second_norm = norm(channels)
        self.first_norm = norm(channels)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, **geometry)
        self.first = nn.Conv2d(channels, channels, 3, **geometry)
        self.down = nn.Sequential(nn.Conv2d(channels, channels, 1, 2, bias=False), norm(channels))
        self.stem = nn.Sequential(nn.Conv2d(4, channels, 3, **geometry), norm(channels), nn.ReLU(inplace=True))

    def forward(self, x):
        x = self.stem(x)
        y = self.first_norm(self.first(x)).relu()
        y = self.second_norm(self.second(y)) + self.down(x)
        return self.head(y.relu().mean((2, 3)))


def net(**options):
    torch.manual_seed(0)
    return calibrate(Net(**options).double(), images())


def relative(expected, got):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def assert_equal(expected, got, scope="model"):
    assert expected.shape == got.shape
    assert relative(expected.double(), got.double()) <= TOLERANCES[expected.dtype][scope]


@torch.no_grad()
def assert_same_function(plain, other, x=None):
    x = images() if x is None else x
    plain, other = copy.deepcopy(plain).eval(), copy.deepcopy(other).eval()
    assert_equal(plain(x), other(x))


@torch.no_grad()
def assert_same_training(plain, expanded, x=None):
    """Equal outputs in three forward passes in train mode, then in eval mode by what these left of the statistics."""
    inputs = [images(seed=seed) for seed in range(3)] if x is None else [x, 1.5 * x + 0.3, x.flip(0).square()]
    plain, expanded = copy.deepcopy(plain).train(), copy.deepcopy(expanded).train()
    for batch in inputs:
        assert_equal(plain(batch), expanded(batch))
    assert_same_function(plain, expanded, inputs[0])


def assert_original_architecture(plain, contracted):
    assert type(contracted) is type(plain)
    assert {name: type(m) for name, m in plain.named_modules()} == {
        name: type(m) for name, m in contracted.named_modules()
    }
    before, after = plain.state_dict(), contracted.state_dict()
    described = [[(key, t.shape, t.dtype, t.device) for key, t in state.items()] for state in (before, after)]
    assert described[0] == described[1]
    copy.deepcopy(plain).load_state_dict(after, strict=True)


def assert_comes_back(plain, expanded, x=None):
    contracted = contract(expanded)
    assert_original_architecture(plain, contracted)
    assert_same_function(expanded, contracted, x)


def expanded_all(model, block="acb", **options):
    """Every convolution of a model expanded."""
    model, report = expand(model, block, where="*", **options)
    assert not report.skipped
    return model
