"""Networks as people write them who never heard of repblocks: plain torch code, each with what must be left of it."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fusion.modules import prepared
from strategies import randn
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class UserNet:
    """A network, two image sizes for it, and how many convolutions and norms must run once it is collapsed.

    ``convs`` counts convolutions and matrix products. Zero is a promise as well: nothing linear was there to keep.
    """

    build: Callable[[], nn.Module]
    convs: int
    norms: int = 0
    shape: tuple[int, ...] = (8, 13, 17)
    other: tuple[int, ...] = (8, 10, 21)

    def model(self) -> nn.Module:
        return prepared(self.build())

    def inputs(self) -> Tensor:
        return randn(0, 3, *self.shape)

    def other_inputs(self) -> Tensor:
        return randn(1, 5, *self.other)


NETS: dict[str, UserNet] = {}


def net(*, convs: int, **rest):
    """Add a class (or a function that builds a module) to `NETS` under its name."""

    def register(build):
        assert build.__name__ not in NETS
        NETS[build.__name__] = UserNet(build=build, convs=convs, **rest)
        return build

    return register


def conv_bn(read: int, written: int, kernel_size, stride=1, padding=0, groups=1) -> nn.Sequential:
    conv = nn.Conv2d(read, written, kernel_size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(written)))


class DBB(nn.Module):
    def __init__(self, read, written, stride=1, groups=1):
        super().__init__()
        self.nonlinear = nn.ReLU()
        self.origin = conv_bn(read, written, 3, stride, 1, groups)
        self.average = nn.Sequential(conv_bn(read, written, 1, 1, 1, groups), nn.AvgPool2d(3, stride))
        self.average.add_module("avgbn", nn.BatchNorm2d(written))
        self.pointwise = conv_bn(read, written, 1, stride, 0, groups)
        self.chain = nn.Sequential()
        self.chain.add_module("conv1", nn.Conv2d(read, read, 1, padding=1, groups=groups, bias=False))
        self.chain.add_module("bn1", nn.BatchNorm2d(read))
        self.chain.add_module("conv2", nn.Conv2d(read, written, 3, stride, groups=groups, bias=False))
        self.chain.add_module("bn2", nn.BatchNorm2d(written))

    def forward(self, inputs):
        out = self.origin(inputs)
        out = out + self.pointwise(inputs)
        out = out + self.average(inputs)
        out = out + self.chain(inputs)
        return self.nonlinear(out)


@net(convs=3)
def diverse_branches():
    return nn.Sequential(DBB(8, 8), DBB(8, 12, stride=2), DBB(12, 8, groups=4))


class YoloRepConv(nn.Module):
    def __init__(self, c1, c2, k=3, s=1, p=None, g=1, *, act=True, deploy=False):
        super().__init__()
        self.deploy = deploy
        self.act = nn.SiLU() if act is True else nn.Identity()
        self.rbr_identity = nn.BatchNorm2d(num_features=c1) if c2 == c1 and s == 1 else None
        self.rbr_dense = conv_bn(c1, c2, k, s, k // 2 if p is None else p, g)
        self.rbr_1x1 = conv_bn(c1, c2, 1, s, 0, g)

    def forward(self, inputs):
        if hasattr(self, "rbr_reparam"):
            return self.act(self.rbr_reparam(inputs))
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.act(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out)


@net(convs=3)
def yolo():
    return nn.Sequential(YoloRepConv(8, 8), YoloRepConv(8, 16, s=2, g=4), YoloRepConv(16, 16, g=2, act=False))


class ACBlock(nn.Module):
    def __init__(self, read, written, kernel_size=3, stride=1):
        super().__init__()
        half = kernel_size // 2
        self.hor_conv = nn.Conv2d(read, written, (1, kernel_size), stride, (0, half), bias=False)
        self.ver_conv = nn.Conv2d(read, written, (kernel_size, 1), stride, (half, 0), bias=False)
        self.square_conv = nn.Conv2d(read, written, kernel_size, stride, half, bias=False)
        self.square_bn, self.ver_bn, self.hor_bn = (nn.BatchNorm2d(written) for _ in range(3))

    def forward(self, input):
        square_outputs = self.square_bn(self.square_conv(input))
        vertical_outputs = self.ver_bn(self.ver_conv(input))
        horizontal_outputs = self.hor_bn(self.hor_conv(input))
        return square_outputs + vertical_outputs + horizontal_outputs


@net(convs=2)
def asymmetric():
    return nn.Sequential(ACBlock(8, 6), nn.ReLU(inplace=True), ACBlock(6, 8, 5, stride=2))


class Residual(nn.Module):
    def __init__(self, *body):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        return x + self.body(x)


@net(convs=1)
def residual_linear_bottleneck():
    squeeze, spread = nn.Conv2d(8, 16, 1, bias=False), nn.Conv2d(16, 8, 3, padding=1, bias=False)
    return Residual(squeeze, spread, nn.BatchNorm2d(8))


@net(convs=1)
def nested_residuals():
    return Residual(Residual(nn.Sequential(Residual(conv_bn(8, 8, 1)), nn.BatchNorm2d(8))), nn.Identity())


@net(convs=2)
def activated_residuals():
    return nn.Sequential(Residual(conv_bn(8, 8, 3, 1, 1)), nn.ReLU(), Residual(conv_bn(8, 8, 3, 1, 1, 2)))


@net(convs=1)
class functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 8, 3, 3))
        self.pointwise, self.bias = nn.Parameter(torch.empty(6, 8, 1, 1)), nn.Parameter(torch.empty(6))
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        bn = self.bn
        wide = F.conv2d(x, self.weight, padding=1)
        wide = F.batch_norm(wide, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, eps=bn.eps)
        return F.relu(torch.add(wide, F.conv2d(x, self.pointwise, self.bias)))


@net(convs=1)
class functional_of_modules(nn.Module):
    """The modules only hold the parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 1, groups=2)

    def forward(self, x):
        first = F.conv2d(x, self.a.weight, self.a.bias, self.a.stride, self.a.padding, self.a.dilation, self.a.groups)
        return torch.relu(first + F.conv2d(x, weight=self.b.weight, bias=self.b.bias, groups=self.b.groups))


@net(convs=1)
class arithmetic(nn.Module):
    """Sums in every spelling, subtraction, constants."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))

    def forward(self, x):
        a, b, c, d, e, f = (conv(x) for conv in self.convs)
        total = torch.add(a, b, alpha=0.5) - 0.5 * c
        total = torch.sub(total, d * 2, alpha=3) + e / 4
        total = (total.add(f) - x).sub(-x.mul(0.25))
        return 1 - sum([total, torch.neg(a), torch.mul(b, -1.5)]).div(2)


@net(convs=1, other=(8, 9, 9))
class constants_of_the_model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(8, 8, 3, padding=1), 0.5
        self.register_buffer("mean", torch.linspace(0.5, 1.5, 8).view(8, 1, 1))
        self.register_buffer("std", torch.linspace(0.2, 2.0, 8).view(1, 8, 1, 1))

    def forward(self, x):
        return (self.conv(x) * self.scale - self.mean) / self.std


@net(convs=0)
class subtracted_norm(nn.Module):
    """A convolution would cost multiplications that nobody paid before."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x - self.norm(x))


class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = conv_bn(8, 4, 3, 1, 1), conv_bn(8, 6, 3, 1, 1)

    def forward(self, x):
        return torch.relu(torch.cat([self.left(x), self.right(x)], dim=1))


@net(convs=1)
def joined_twins():
    return nn.Sequential(Twins(), nn.MaxPool2d(2))


@net(convs=2)
class inception(nn.Module):
    """As one 3x3 convolution it would cost more."""

    def __init__(self):
        super().__init__()
        self.point, self.wide = conv_bn(8, 6, 1), conv_bn(8, 4, 3, 1, 1)

    def forward(self, x):
        return torch.relu(torch.cat((self.point(x), self.wide(x)), 1))


@net(convs=1)
class joined_then_mixed(nn.Module):
    """Cheaper as one 3x3 convolution, since the middle is wide."""

    def __init__(self):
        super().__init__()
        self.point, self.wide, self.norm = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(40)
        self.mix = nn.Conv2d(40, 8, 1)

    def forward(self, x):
        return self.mix(self.norm(torch.cat([self.point(x), x, self.wide(x)], dim=-3)))


@net(convs=1)
class split_halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = conv_bn(4, 6, 3, 1, 1), conv_bn(4, 6, 3, 1, 1)

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        return torch.cat([self.left(left), self.right(right)], dim=1)


class SlicedAndSummed(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(5, 8, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.left(x[:, :3]) + self.right(x[:, 3:, :, :]) + x)


@net(convs=1)
def sliced_and_summed():
    return nn.Sequential(SlicedAndSummed(), nn.MaxPool2d(2))


@net(convs=2)
class partial_conv(nn.Module):
    """FasterNet's: dense kernels over all channels would cost more."""

    def __init__(self):
        super().__init__()
        self.partial, self.expand = nn.Conv2d(2, 2, 3, padding=1, bias=False), conv_bn(8, 16, 1)

    def forward(self, x):
        x1, x2 = torch.split(x, [2, 6], dim=1)
        return torch.relu(self.expand(torch.cat((self.partial(x1), x2), 1)))


@net(convs=2)
class channel_scales(nn.Module):
    """One parameter for each channel, in several shapes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), conv_bn(8, 8, 3, 1, 1, groups=4)
        self.flat, self.shift = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(8, 1, 1))
        self.full, self.scalar = nn.Parameter(torch.empty(1, 8, 1, 1)), nn.Parameter(torch.empty(()))
        self.one = nn.Parameter(torch.empty(1))

    def forward(self, x):
        x = x + self.first(x) * self.flat.view(1, -1, 1, 1)
        x = torch.relu(x * self.scalar + self.shift)
        y = self.second(x * self.full) * self.one
        return x.mul(self.flat[:, None, None]) + self.flat.reshape(-1, 1, 1) * y


@net(convs=1)
class channels_last_scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Parameter(torch.empty(8))

    def forward(self, x):
        y = self.conv(x).permute(0, 2, 3, 1)
        return x + (self.gamma * y).permute(0, 3, 1, 2)


@net(convs=1)
class averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.project = conv_bn(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 1, bias=False)
        self.pool, self.norm = nn.AvgPool2d(3, stride=1, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.conv(x) + self.norm(self.pool(self.project(x))) + F.avg_pool2d(x, 3, 1, 1)


@net(convs=1)
def pooled_projection():
    """ResNet-D's shortcut: a strided 2x2 convolution would cost four times as much."""
    return nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), conv_bn(8, 16, 1))


@net(convs=2)
class padded_by_hand(nn.Module):
    def __init__(self):
        super().__init__()
        self.pad, self.conv, self.point = nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.wide, self.last = nn.Conv2d(8, 8, (5, 3)), conv_bn(8, 8, 3, 1, 1)

    def forward(self, x):
        x = torch.relu(self.conv(self.pad(x)) + self.point(x))
        return self.wide(F.pad(x, (1, 1, 2, 2))) + self.last(F.pad(x, [0, 0, 0, 0]))


@net(convs=1)
def padded_unevenly():
    """TensorFlow's stride 2: a conv padded evenly needs a larger kernel, which would cost more."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv_bn(8, 6, 3, 2), nn.ReLU())


@net(convs=2, norms=1)
def norm_before_padding():
    """What the padding adds is zero, not the norm's image of zero: the middle norm cannot cross it."""
    padded = nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), padded, nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3))


class UserDropPath(nn.Module):
    def __init__(self, drop_prob=0.1):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        return x.div(keep_prob) * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep_prob)


@net(convs=1)
class dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.Dropout2d(0.4), nn.BatchNorm2d(8)
        self.path, self.point = UserDropPath(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.bn(self.drop(self.conv(x)))
        return x + self.path(y) + F.dropout(self.point(x), 0.3, self.training)
