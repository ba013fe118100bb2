"""More of `hazards`: axes, broadcasts, slices, pools and padding that look like something else."""

import torch
import torch.nn.functional as F
from graph.hazards import Three, hazard
from graph.user_nets import conv_bn
from torch import nn


class Many(nn.Module):
    """As many convs and norms as its forward takes, each used once."""

    def __init__(self, convs, norms):
        super().__init__()
        self.wide = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(convs))
        self.point = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(convs))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(norms))


@hazard(shape=(3, 8, 16, 16), other=(4, 8, 12, 16))
class joined_along_other_axes(Many):
    """The batch, the rows, the columns, a new one."""

    def __init__(self):
        super().__init__(6, 4)

    def forward(self, x):
        wide, point, norms = iter(self.wide), iter(self.point), iter(self.norms)
        batch = next(norms)(torch.cat([next(wide)(x), next(wide)(x)], 0))
        default = next(norms)(torch.cat([next(point)(x), next(wide)(x)]))
        rows = next(norms)(torch.cat([next(wide)(x), next(wide)(x)], dim=2))
        columns = next(norms)(torch.cat([x, next(point)(x)], -1))
        return batch, default, rows, columns, torch.stack([next(point)(x), next(point)(x)], 1).flatten(1, 2)


@hazard(shape=(4, 8, 16, 16), other=(6, 8, 12, 16))
class split_along_other_axes(Many):
    def __init__(self):
        super().__init__(5, 2)

    def forward(self, x):
        wide, point, norms = iter(self.wide), iter(self.point), iter(self.norms)
        top, bottom = x.chunk(2, dim=-2)
        first, second = torch.split(x, x.shape[0] // 2)
        vertical = next(norms)(next(wide)(top) + next(point)(bottom))
        batch = next(norms)(next(wide)(first) - next(point)(second))
        sparse = next(wide)(x[:, ::2].repeat(1, 2, 1, 1)) + next(point)(x[:, [1, 0, 3, 2, 5, 4, 7, 6]])
        return vertical, batch, sparse, next(point)(x[:, :, 1:-1, ::2]) + x[:, :, 1:-1, ::2], next(wide)(x[1:])


@hazard(shape=(3, 8, 12, 12), other=(4, 8, 9, 9))
class turned(Many):
    """Turned, flipped and rolled between the layers; at square sizes the shapes do not tell."""

    def __init__(self):
        super().__init__(6, 4)

    def forward(self, x):
        wide, point, norms = iter(self.wide), iter(self.point), iter(self.norms)
        swapped = next(point)(next(wide)(x).transpose(2, 3)) + next(wide)(x)
        flipped = next(norms)(next(wide)(x).flip(1)), next(norms)(next(point)(x).flip(3)) + next(point)(x)
        rolled = next(norms)(next(point)(x.roll(1, 1))), next(norms)(next(wide)(x).roll(2, 2)) + x.roll(1, 3)
        turned = next(point)(next(wide)(x).rot90(1, (2, 3))) + x.rot90(1, (2, 3)), torch.fliplr(next(wide)(x)) + x
        return swapped, flipped, rolled, turned


@hazard(shape=(8, 8, 8, 8), other=(5, 8, 10, 8))
class other_broadcasts(Many):
    """Every axis has eight entries at the first size: shapes alone do not tell which one is scaled."""

    def __init__(self):
        super().__init__(7, 2)
        self.columns, self.fifth = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(1, 1, 8, 1, 1))
        self.pixels, self.gain = nn.Parameter(torch.empty(8, 1, 8)), nn.Parameter(torch.empty(8, 1, 1))
        self.ones = nn.ModuleList(nn.Conv2d(8, 1, 3, padding=1) for _ in range(3))

    def forward(self, x):
        wide, point, norms, ones = iter(self.wide), iter(self.point), iter(self.norms), iter(self.ones)
        columns = next(norms)(next(wide)(x) * self.columns) + next(point)(x)
        broadcast = next(wide)(x) + next(ones)(x), next(norms)(next(ones)(x) * self.gain), x - next(ones)(x)
        pooled = (
            next(point)(x) + F.avg_pool2d(x, x.shape[2:]),
            next(wide)(x).mean((2, 3), keepdim=True) + next(point)(x),
        )
        return columns, broadcast, pooled, next(wide)(x) * self.fifth, next(point)(x) + self.pixels, next(wide)(x) + 1


@hazard
class constants_first(nn.Module):
    """The tensor is the second operand."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.shift, self.gain = nn.Parameter(torch.empty(8, 1, 1)), nn.Parameter(torch.empty(1, 8, 1, 1))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        a, b, c, d = (conv(x) for conv in self.convs)
        return self.shift + F.relu(a), self.gain * (self.shift + b), self.norm(1 - c), torch.sub(self.shift, d)


@hazard(convs=4)
class slices_of_results(nn.Module):
    """The convolution may compute less, but the slice must not cut twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (conv_bn(8, 8, 3, 1, 1) for _ in range(3))

    def forward(self, x):
        left, right = self.b(x).split([3, 5], 1)
        return F.relu(self.a(x)[:, 1:3]), torch.sigmoid(left), self.c(x).chunk(4, 1)[1], right.narrow(1, 1, 2)


@hazard
class pooled_results(nn.Module):
    """A pool is a convolution or moves positions, but not both."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 2, bias=False) for _ in range(3))
        self.gain, self.pad = nn.Parameter(torch.empty(8, 1, 1)), nn.ZeroPad2d((1, 0, 0, 1))
        self.pools = nn.ModuleList([nn.AvgPool2d(2), nn.AvgPool2d(2, 1), nn.AvgPool2d(3, 1, 1)])
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.norm(self.b(x))
        first = self.pad(self.pools[0](self.a(x) * self.gain))
        return first, self.gain * self.pools[1](y), self.norm(self.pools[2](y)), F.avg_pool2d(self.c(x), 2) * self.gain


@hazard
class settled_layers(nn.Module):
    """Nothing is left to merge with what does nothing."""

    def __init__(self):
        super().__init__()
        self.same, self.drop, self.flat = nn.Identity(), nn.Dropout2d(0.3), nn.Flatten(2)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x):
        a, b, c = self.convs
        return self.same(a(self.same(F.relu(x)))), self.drop(b(self.drop(x))), self.flat(c(x.contiguous()))


@hazard
class unet(nn.Module):
    """A transposed convolution told its output size by name."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.up, self.last = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1), conv_bn(16, 4, 3, 1, 1)

    def forward(self, x):
        y = self.norm(self.up(F.relu(self.down(x)), output_size=x.shape[2:]))
        return self.last(torch.cat([x, F.interpolate(y, x.shape[2:])], 1))


@hazard
class poolings(nn.Module):
    """Averages that leave out the padding or count less at the end are no convolutions."""

    def __init__(self):
        super().__init__()
        self.conv, self.max = conv_bn(8, 8, 3, 2, 1), nn.MaxPool2d(3, 2, 1)
        self.uncounted, self.ragged = nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2, ceil_mode=True)
        self.divided, self.point = nn.AvgPool2d(3, 2, 1, divisor_override=2), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.point(x)
        return self.conv(x) + self.uncounted(y) + self.ragged(y) + self.divided(y) + self.max(x)


@hazard
class padded_by_a_number(Three):
    def forward(self, x):
        return self.bn(F.pad(self.b(x), (1,) * 4, value=1.0)), self.a(F.pad(x, (1, 1), value=0.5)), F.pad(x, (-1, 1))


@hazard
class shuffled(Three):
    def forward(self, x):
        n, c, h, w = self.a(x).shape
        return self.bn(self.a(x).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)) + self.b(x)


@hazard
class unbatched(Three):
    """What looks like a batch has channels in front."""

    def forward(self, x):
        mean = x.mean(0)
        square = mean[:, :8, :8]
        rows = self.bn.weight.view(8, 1)
        return F.conv2d(square, self.a.weight, padding=1) * rows, F.conv2d(square, self.b.weight) + self.a(square)


@hazard
class geometry_of_the_input(Three):
    """Padding and stride are read from the image."""

    def forward(self, x):
        side = x.shape[2] // 10
        return F.batch_norm(F.conv2d(x, self.a.weight, padding=side), self.bn.running_mean, self.bn.running_var)


@hazard
class functional_batch_statistics(Three):
    def forward(self, x):
        mean, var = self.bn.running_mean.clone(), self.bn.running_var.clone()
        return F.batch_norm(self.a(x), None, None, training=True), F.batch_norm(self.b(x), mean, var, training=True)


@hazard(shape=(3, 8, 13, 17), other=(5, 8, 10, 17))
class arithmetic_that_is_no_scale(Many):
    """Rounded, varying by pixel, from one channel to many, with a factor that the image gives."""

    def __init__(self):
        super().__init__(4, 4)
        self.one = nn.Conv2d(8, 1, 1)
        self.gain, self.columns = nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(8, 1, 17))

    def forward(self, x):
        wide, point, norms = iter(self.wide), iter(self.point), iter(self.norms)
        rounded = next(norms)(torch.div(next(wide)(x), 0.5, rounding_mode="floor"))
        by_column = next(norms)(next(wide)(x) * self.columns)
        widened = next(norms)(self.one(x) * self.gain)
        by_size = next(norms)(torch.add(next(wide)(x), next(point)(x), alpha=x.shape[2]))
        return rounded, by_column, widened, by_size, torch.cat([next(wide)(x), next(point)(x)])


@hazard(shape=(3, 8, 12, 12), other=(4, 8, 9, 9))
class views_that_do_not_come_back(Many):
    """Cut in two axes at once; the same shape, but turned; averaged twice without a change of size."""

    def __init__(self):
        super().__init__(4, 4)
        self.narrow = nn.BatchNorm2d(4)

    def forward(self, x):
        wide, point, norms = iter(self.wide), iter(self.point), iter(self.norms)
        cut = self.narrow(next(wide)(x)[:, 4:, 1:])
        turned = next(wide)(x).transpose(2, 3).flatten(2).reshape(x.shape)
        pooled = F.avg_pool2d(F.avg_pool2d(next(wide)(x), 3, 1, 1), 3, 1, 1)
        return cut, next(norms)(turned + next(point)(x)), next(norms)(pooled + next(point)(x))
