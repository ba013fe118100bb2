"""Networks in which something plain code is free to do stands in the way of merging, each with what stands there."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fusion.modules import prepared
from graph.user_nets import YoloRepConv, conv_bn
from strategies import randn
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


@dataclass(frozen=True, kw_only=True)
class Hazard:
    """A network and two input sizes.

    ``convs`` and ``norms`` are the most that may be left (matrix products count) where something must still merge.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 8, 13, 17)
    other: tuple[int, ...] = (5, 8, 10, 21)
    inputs: int = 1
    convs: int | None = None
    norms: int | None = None

    def model(self) -> nn.Module:
        return prepared(self.build())

    def cases(self) -> list[tuple[Tensor, ...]]:
        shapes = self.shape, self.other
        return [tuple(randn(seed + at, *shape) for at in range(self.inputs)) for seed, shape in enumerate(shapes)]


HAZARDS: dict[str, Hazard] = {}


def hazard(build=None, **rest):
    """Add a class (or a function that builds a module) to `HAZARDS` under its name."""

    def register(build):
        assert build.__name__ not in HAZARDS
        HAZARDS[build.__name__] = Hazard(build=build, **rest)
        return build

    return register if build is None else register(build)


class Three(nn.Module):
    """Two convs and a norm, for the forwards below."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.bn = nn.BatchNorm2d(8)


class Parallel(Three):
    def forward(self, x):
        return F.relu(self.bn(self.a(x) + self.b(x)))


@hazard
class shared_weight(Three):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.c.weight, self.bn2 = self.a.weight, nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn2(self.c(F.relu(self.bn(self.a(x)))))


@hazard
class weight_read_elsewhere(Three):
    """Another convolution uses the weight in its own way."""

    def forward(self, x):
        tied = F.conv2d(F.relu(x), self.a.weight.flip(-1), padding=1)
        return self.bn(self.a(x)), tied, self.a.weight.square().sum(), self.bn.weight.mean()


@hazard
class conv_called_twice(Three):
    def forward(self, x):
        return self.bn(self.a(x)) + F.relu(self.a(F.relu(x))) + self.b(x)


@hazard
class norm_called_twice(Three):
    def forward(self, x):
        return F.relu(self.bn(self.a(x))) + self.bn(self.b(x))


@hazard
class called_twice_on_the_same(Three):
    def forward(self, x):
        return self.bn(self.a(x) + self.a(x)) - self.b(x)


@hazard
class shared_head(nn.Module):
    """A detector's: one head for every level."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(YoloRepConv(8, 8), conv_bn(8, 4, 1))
        self.down = nn.MaxPool2d(2)

    def forward(self, x):
        return [self.head(level) for level in (x, self.down(x), self.down(self.down(x)))]


@hazard
class registered_under_two_names(Three):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(self.a, self.bn, nn.ReLU())
        self.again = self.body

    def forward(self, x):
        return self.again(x)


@hazard
class intermediate_returned(Three):
    def forward(self, x):
        y = self.a(x)
        return self.bn(y), y


@hazard
class intermediate_read_by_an_activation(Three):
    def forward(self, x):
        y = self.a(x)
        return self.bn(y) + F.relu(y) + self.b(y)


@hazard
class two_norms_of_one_conv(Three):
    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.a(x)
        return F.relu(self.bn(y)) * F.relu(self.other(y))


@hazard(convs=1, norms=0)
class added_in_place(Three):
    """As ResNets, DBB and MobileOne are written."""

    def forward(self, x):
        out = self.bn(self.a(x))
        out += self.b(x)
        out += x
        return F.relu_(out)


@hazard
class methods_in_place(Three):
    def forward(self, x):
        out = self.a(x).add_(self.b(x)).mul_(0.5)
        torch.add(out, x, out=out)
        return self.bn(out.sub_(1.0).div_(3))


@hazard
class activation_writes_into_the_source(Three):
    """Both branches behind it read the rectified tensor, the one before it does not."""

    def __init__(self):
        super().__init__()
        self.relu, self.stem = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.stem(x)
        early = self.a(x)
        late = self.bn(self.relu(x))
        return early + late + self.b(x)


@hazard
class activation_writes_into_a_branch(Three):
    def forward(self, x):
        y = self.a(x)
        z = F.relu(y, inplace=True)
        return self.bn(y) + z


@hazard
class source_changed_between_two_reads(Three):
    def forward(self, x):
        x = torch.tanh(x)
        first = self.a(x)
        x.add_(1.0)
        return first + self.b(x) + x


@hazard
class source_changed_through_a_view(Three):
    def forward(self, x):
        x = torch.tanh(x)
        first = self.a(x)
        x[:, :4].mul_(2.0)
        x.flatten(2).sub_(0.5)
        return self.bn(first + self.b(x))


@hazard
class source_changed_through_an_identity(Three):
    def __init__(self):
        super().__init__()
        self.same, self.drop = nn.Identity(), nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        x = torch.tanh(x)
        first = self.b(x)
        y = self.drop(self.same(x))
        y.relu_()
        return first + self.a(x) + y


@hazard
class viewed_after_a_change(Three):
    """The view is of the changed tensor, though it names the one before."""

    def __init__(self):
        super().__init__()
        self.norm, self.same = nn.BatchNorm1d(8), nn.Identity()

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        y.mul_(2.0)
        z.relu_()
        return self.norm(y.flatten(2)), self.bn(self.same(z))


class WritesWhereItCannotBeTraced(nn.Module):
    def forward(self, x, y):
        if bool((x > 1e9).any()):
            return x
        x.mul_(2.0)
        y += 1.0
        return x - y


@hazard
class changed_where_it_cannot_be_traced(Three):
    def __init__(self):
        super().__init__()
        self.writer = WritesWhereItCannotBeTraced()

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        difference = self.writer(y, z)
        return self.bn(y) + z, difference


@hazard
class order_of_writers_without_readers(Three):
    """Nobody reads what the statements return."""

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        y.add_(z)
        z.sub_(y)
        y *= 0.5
        z.copy_(z + y)
        return self.bn(y) - z


@hazard
class result_changed_through_a_view(Three):
    def forward(self, x):
        y = self.a(x)
        y.chunk(2, dim=1)[1].clamp_(min=0)
        return self.bn(y) + self.b(x)


@hazard
class items_assigned(Three):
    def forward(self, x):
        y = self.a(x)
        y[:, 0] = 0.0
        return self.bn(y) + self.b(x)


@hazard
class input_changed_in_place(Three):
    def forward(self, x):
        x.sub_(0.25)
        return self.bn(self.a(x)) + self.b(x)


class BNAndPad(nn.Module):
    """DBB's own: the border is the norm's image of zero, written into a padded tensor."""

    def __init__(self, pixels, width):
        super().__init__()
        self.bn, self.pixels = nn.BatchNorm2d(width), pixels

    def forward(self, x):
        y, bn = self.bn(x), self.bn
        border = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
        y, border = F.pad(y, [self.pixels] * 4), border.view(1, -1, 1, 1)
        y[:, :, 0 : self.pixels, :] = border
        y[:, :, -self.pixels :, :] = border
        y[:, :, :, 0 : self.pixels] = border
        y[:, :, :, -self.pixels :] = border
        return y


@hazard
class border_written_by_hand(Three):
    def __init__(self):
        super().__init__()
        self.chain = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), BNAndPad(1, 8), nn.Conv2d(8, 8, 3, bias=False))

    def forward(self, x):
        out = self.a(x)
        out += self.chain(x)
        out += self.b(x)
        return F.relu(self.bn(out))


@hazard
def frozen_norm():
    norms = FrozenBatchNorm2d(8), FrozenBatchNorm2d(6)
    for norm in norms:
        for seed, buffer in enumerate(norm.buffers()):
            buffer.copy_(randn(seed, *buffer.shape).abs() + 0.5)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norms[0], nn.ReLU(), nn.Conv2d(8, 6, 1), norms[1])
