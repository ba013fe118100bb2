"""Chains of layers between which nothing is merged, or only some: each with what must be left of it."""

import torch
import torch.nn.functional as F
from graph.user_nets import conv_bn, net
from torch import nn

import repblocks as rb
from repblocks.fusion import fold


@net(convs=2)
def separable():
    """Depthwise and pointwise stay a pair: together they would cost more."""
    return nn.Sequential(conv_bn(8, 8, 3, 1, 1, groups=8), conv_bn(8, 16, 1), nn.ReLU())


class DepthwiseBranches(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.large, self.small = conv_bn(width, width, 7, 1, 3, width), conv_bn(width, width, 3, 1, 1, width)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.bn(self.large(x) + self.small(x) + x)


@net(convs=3)
def inverted_bottleneck():
    return nn.Sequential(DepthwiseBranches(8), conv_bn(8, 32, 1), nn.GELU(), conv_bn(32, 8, 1))


@net(convs=2)
class depthwise_beside_dense(nn.Module):
    """In one kernel both would be dense 3x3."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = conv_bn(8, 8, 3, 1, 1, groups=8), conv_bn(8, 8, 1)

    def forward(self, x):
        return torch.relu(self.depthwise(x) + self.pointwise(x))


@net(convs=1)
def wide_chain():
    return nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.ReLU())


@net(convs=2, shape=(16, 13, 17), other=(16, 10, 21))
def narrow_chain():
    return nn.Sequential(nn.Conv2d(16, 3, 1, bias=False), conv_bn(3, 16, 3, 1, 1), nn.ReLU())


@net(convs=2)
def unpadded_chain():
    """As one 5x5 kernel it would cost more."""
    return nn.Sequential(conv_bn(8, 8, 3), conv_bn(8, 8, 3))


@net(convs=2)
class functions_with_all_their_arguments(nn.Module):
    """A bias, an eps and a divisor that are not the default ones."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x):
        x = self.conv(F.avg_pool2d(x, 1, divisor_override=2))
        x = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, eps=0.3)
        x = F.relu(x).mean((2, 3))
        return F.linear(x, self.head.weight, self.head.bias) * self.gain


@net(convs=1)
def halved_before_the_norm():
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.AvgPool2d(1, divisor_override=2), nn.BatchNorm2d(8), nn.ReLU())


@net(convs=2)
class signs_and_factors(nn.Module):
    """What is subtracted from a number, and what is added some times."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.bn = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.shift = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x):
        x = F.relu(self.bn(0 - self.first(x)))
        return F.relu(torch.add(torch.sub(self.second(x), self.shift, alpha=2), self.shift, alpha=5) - 0)


@net(convs=2)
class halves_in_the_other_order(nn.Module):
    """Behind each other the slices are not the channels in their order."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return F.relu(torch.cat([self.first(x[:, 4:]), self.second(x[:, :4])], 1))


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


fold.register(Halved)(
    lambda module, in_channels: rb.AffineConv(weight=torch.full((in_channels, 1), 0.5), groups=in_channels)
)


@net(convs=1)
def a_layer_with_a_rule_of_its_own():
    return nn.Sequential(nn.Conv2d(8, 8, 3), Halved(), nn.BatchNorm2d(8), nn.ReLU())
