"""More of `hazards`: what code does beside calling layers, and how modules and their parents hang together."""

import torch
import torch.nn.functional as F
from graph.hazards import Three, hazard
from graph.user_nets import Residual, YoloRepConv, conv_bn
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d
from torch import nn


@hazard
class counts_its_calls(Three):
    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        self.seen.append(tuple(x.shape))
        self.steps += 1
        return self.bn(self.a(x)) + self.b(x)


@hazard
class remembers_its_input(Three):
    def forward(self, x):
        self.last = x
        return self.bn(self.a(x)) + self.b(x)


@hazard
class batch_statistics_in_eval(Three):
    def __init__(self):
        super().__init__()
        self.bn, self.plain = nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8, affine=False)

    def forward(self, x):
        return self.plain(self.a(x)) + self.bn(self.b(x)) + F.instance_norm(x)


@hazard
class overridden_forward(Three):
    """On the instance, as monkey patches do."""

    def __init__(self):
        super().__init__()
        self.a.forward = _squared
        self.bn.forward = torch.tanh

    def forward(self, x):
        return self.bn(self.a(x)) + self.b(x)


def _squared(x):
    return x * x


class RoundedConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, torch.round(4 * weight) / 4, bias)


class ClampedNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).clamp(-1, 1)


@hazard(convs=5)
def subclasses():
    act = BatchNormAct2d(8)
    layers = StdConv2d(8, 8, 3, padding=1), act, Conv2dSame(8, 8, 3, 2), nn.BatchNorm2d(8), RoundedConv(8, 8, 1)
    return nn.Sequential(*layers, ClampedNorm(8), conv_bn(8, 8, 3), BatchNormAct2d(8, apply_act=False), act, RepMix())


class RepMix(YoloRepConv):
    def __init__(self):
        super().__init__(8, 8)

    def forward(self, inputs):
        return super().forward(inputs) - inputs


@hazard(convs=2)
class data_dependent_branch(nn.Module):
    """It cannot be traced, its blocks can."""

    def __init__(self):
        super().__init__()
        self.positive, self.negative = YoloRepConv(8, 8), nn.Sequential(conv_bn(8, 8, 1), Residual(conv_bn(8, 8, 1)))

    def forward(self, x):
        if x.sum() > 0:
            return self.positive(x)
        return self.positive(-x) + F.relu(self.negative(x)).flatten(1).shape[1]


@hazard(convs=3)
class part_untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.head = YoloRepConv(8, 8), data_dependent_branch(), conv_bn(8, 6, 3)

    def forward(self, x):
        return self.head(self.gate(self.stem(x)))


@hazard
class loop_over_the_shape(Three):
    def forward(self, x):
        rows = [self.b(x[:, :, row : row + 1]) for row in range(x.shape[2])]
        return self.bn(self.a(x)) + torch.cat(rows, 2) / x.size(3)


@hazard
class iterated_parameter(Three):
    def __init__(self):
        super().__init__()
        self.gains = nn.Parameter(torch.empty(2, 8, 1, 1))

    def forward(self, x):
        return sum(gain * conv(x) for gain, conv in zip(self.gains, (self.a, self.b), strict=True))


class Pairs(nn.Module):
    """Several inputs and outputs, by position, by name, in containers."""

    def __init__(self):
        super().__init__()
        self.left, self.right = conv_bn(8, 8, 3, 1, 1), YoloRepConv(8, 8)

    def forward(self, pair, *rest, scale=1.0, extra=None):
        x, y = pair
        return {"sum": self.left(x) * scale + self.right(y), "rest": [rest, extra["z"] if extra else None]}


@hazard(convs=3)
class structured_calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.pairs, self.mix = Pairs(), conv_bn(8, 8, 1)

    def forward(self, x):
        out = self.pairs((x, F.relu(x)), 3, scale=0.5, extra={"z": x, "name": "z"})
        (number,), z = out["rest"]
        return self.mix(out["sum"]) * number + z, [out["sum"].shape[1], None, "text"]


@hazard(inputs=2)
class two_inputs(Three):
    def __init__(self):
        super().__init__()
        self.other = conv_bn(8, 8, 1)

    def forward(self, x, y=None, *, gain=2.0):
        return self.bn(self.a(x) + x) + gain * self.b(x + y), self.other(y) - y


@hazard
class called_by_keyword(Three):
    def __init__(self):
        super().__init__()
        self.c, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = torch.add(input=self.bn(input=self.a(input=x)), other=self.b(x), alpha=2)
        top = torch.chunk(input=self.c(x), chunks=2, dim=1)[0]
        top = top + F.pad(pad=(1, 1, 1, 1), input=x)[:, 2:6, 1:-1, 1:-1]
        joined = torch.cat(tensors=[self.norm(top), torch.split(y, split_size_or_sections=4, dim=1)[1]], dim=1)
        return F.relu(input=joined) + F.conv2d(weight=self.b.weight, input=F.dropout(input=x, training=False))


@hazard(shape=(8, 13, 17), other=(8, 11, 9))
class without_a_batch(Three):
    def __init__(self):
        super().__init__()
        self.c, self.gain = nn.Conv2d(8, 4, 1), nn.Parameter(torch.empty(8, 1, 1))

    def forward(self, x):
        return torch.cat([self.gain * (self.a(x) + self.b(x)), self.c(x)], dim=0)


@hazard
class dynamic_weight(Three):
    def __init__(self):
        super().__init__()
        self.make = nn.Linear(8, 64)

    def forward(self, x):
        weight = self.make(x.mean((0, 2, 3))).view(8, 8, 1, 1)
        return self.bn(F.conv2d(x, weight)) + F.conv2d(self.a(x), weight) + torch.sigmoid(x[:1, :, :1, :1]) * self.b(x)


@hazard(convs=1)
class mixture(Three):
    """DARTS-like: the weights of the branches are a function of parameters only."""

    def __init__(self):
        super().__init__()
        self.alphas = nn.Parameter(torch.empty(3))

    def forward(self, x):
        gains = torch.softmax(self.alphas, dim=0)
        return F.relu(self.bn(gains[0] * self.a(x) + gains[1] * self.b(x) + gains[2] * x))


@hazard
class computed_weight(nn.Module):
    """OREPA-like and standardised: the kernel is a function of parameters only."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Parameter(torch.empty(4, 8, 1, 1)), nn.Parameter(torch.empty(8, 4, 3, 3))
        self.raw, self.bn = nn.Parameter(torch.empty(8, 8, 3, 3)), nn.BatchNorm2d(8)

    def forward(self, x):
        chained = torch.einsum("oihw,ijkl->ojhw", self.outer, self.inner)
        mean, std = self.raw.mean((1, 2, 3), keepdim=True), self.raw.std((1, 2, 3), keepdim=True)
        return self.bn(F.conv2d(x, chained, padding=1) + F.conv2d(x, (self.raw - mean) / std, None, 1, 1))


@hazard
class padding_by_attributes(nn.Module):
    """Code that reads the geometry of a layer, and asks what is there."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act, self.none = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), None
        self.point = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        side = self.conv.dilation[0] * (self.conv.kernel_size[0] - 1) // 2
        y = self.conv(F.pad(x, (side,) * 4)) + self.point(x)
        if isinstance(self.bn, nn.BatchNorm2d) and self.bn.eps < 1:
            y = self.bn(y) * self.conv.out_channels + int(self.conv.bias is None)
        return y if self.none is None else self.none(y)


@hazard(norms=0)
class features_by_index(nn.Module):
    """VGG-like: the positions of layers mean something."""

    def __init__(self):
        super().__init__()
        layers = (
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
        )
        self.features = nn.Sequential(*layers, nn.ReLU(), nn.Dropout(), conv_bn(8, 4, 3))

    def forward(self, x):
        kept = []
        for at, layer in enumerate(self.features):
            x = layer(x)
            if at in {4, 7} or isinstance(layer, nn.ReLU):
                kept.append(x)
        return kept, len(self.features)


@hazard
class sliced_container(features_by_index):
    """A container made in the forward, of layers that have run already."""

    def forward(self, x):
        return self.features[3:](self.features[:3](x)) if x.dim() == 4 else None


class WithSkip(Three):
    def forward(self, x):
        y = self.a(x)
        return y - x, (y, self.bn(y))


@hazard
class returned_and_never_read(nn.Module):
    """What a module returns it computes, whether it is read or not."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = WithSkip(), WithSkip(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y, _ = self.first(x)
        _, (_, z) = self.second(F.relu(y))
        return self.head(z)


class Passing(nn.Module):
    def forward(self, first, second):
        return first, torch.sigmoid(second)


@hazard
class passed_through_and_never_read(Three):
    """What a module is given has to be calculated, whether it does something with it or not."""

    def __init__(self):
        super().__init__()
        self.passing, self.shift = Passing(), nn.Parameter(torch.empty(8, 1, 1))

    def forward(self, x):
        y = self.a(x)
        _, z = self.passing(y, x)
        return self.shift + y, z


class Attributed(Three):
    """Its parent asks it things."""

    def __init__(self):
        super().__init__()
        self.kept, self.channels, self.table = [self.a, "a"], 8, {"stride": 1}

    def forward(self, x):
        return F.relu(self.bn(self.a(x) + self.b(x)))

    def halved(self, x):
        return x * 0.5


@hazard(convs=1)
class attributes_read_from_outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.scale = Attributed(), 2.0

    def forward(self, x):
        y = self.block(x)
        if self.block.channels == y.shape[1] and self.block.kept[1] == "a":
            y = self.block.halved(y) * self.block.table["stride"]
        return y * self.scale


@hazard(convs=1)
class buffers_read_from_outside(nn.Module):
    """A layer that goes is asked for its statistics, its settings and its weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y, self.bn.running_mean[:2], self.bn.running_var.sum(), self.bn.eps, self.conv.weight.shape[0]


@hazard(shape=(3, 8, 4, 5), other=(2, 8, 3, 4))
class other_layers(nn.Module):
    """What is not known is left alone, whatever it returns."""

    def __init__(self):
        super().__init__()
        self.conv, self.group, self.layer = conv_bn(8, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.attend, self.memory = nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 4, batch_first=True)
        self.norm, self.act = nn.BatchNorm1d(4), nn.PReLU(8)

    def forward(self, x):
        tokens = self.layer(self.group(self.act(self.conv(x))).flatten(2).transpose(1, 2))
        attended, weights = self.attend(tokens, tokens, tokens)
        states, (hidden, _) = self.memory(attended)
        return self.norm(states.transpose(1, 2)), hidden, weights


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


@hazard
class custom_function(Three):
    def forward(self, x):
        with torch.no_grad():
            low = self.b(x)
        return self.bn(Straight.apply(self.a(x))) + low


@hazard
class numpy_inside(Three):
    def forward(self, x):
        factor = float(x.detach().numpy().shape[1])
        return self.bn(self.a(x)) + factor * self.b(x)
