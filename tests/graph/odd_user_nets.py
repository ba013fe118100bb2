"""More of `user_nets`: other ranks, vectors and tokens, heads, and modules put together in odd ways."""

import torch
import torch.nn.functional as F
from graph.user_nets import Residual, conv_bn, net
from timm.layers import DropPath, LayerScale2d
from torch import nn

VECTORS = {"shape": (10,), "other": (10,)}
TOKENS = {"shape": (7, 8), "other": (12, 8)}


@net(convs=2, **VECTORS)
def perceptron():
    layers = nn.Linear(10, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.BatchNorm1d(7), nn.Dropout(), nn.Linear(7, 3)
    return nn.Sequential(*layers, nn.BatchNorm1d(3, affine=False))


@net(convs=3, **VECTORS)
def linear_chains():
    """A low-rank pair stays a pair, a wide one merges."""
    low_rank, wide = (nn.Linear(10, 2, bias=False), nn.Linear(2, 10)), (nn.Linear(10, 40), nn.Linear(40, 4))
    return nn.Sequential(*low_rank, nn.ReLU(), *wide)


@net(convs=1, **VECTORS)
class residual_vectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(10, 10), nn.BatchNorm1d(10)
        self.weight = nn.Parameter(torch.empty(10, 10))

    def forward(self, x):
        return x + self.norm(self.fc(x)) + F.linear(x, self.weight) - 0.5 * x


class LinearNorm(nn.Sequential):
    """LeViT's, over tokens."""

    def __init__(self, read, written):
        super().__init__()
        self.add_module("c", nn.Linear(read, written, bias=False))
        self.add_module("bn", nn.BatchNorm1d(written))

    def forward(self, x):
        x = self.c(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


@net(convs=2, **TOKENS)
def token_mlp():
    return Residual(LinearNorm(8, 16), nn.Hardswish(), nn.Dropout(0.1), LinearNorm(16, 8))


@net(convs=2, **TOKENS)
class transposed_tokens(nn.Module):
    """BatchNorm wants the channels second, the linear layer wants them last."""

    def __init__(self):
        super().__init__()
        self.fc1, self.norm1, self.fc2, self.norm2 = (
            nn.Linear(8, 16),
            nn.BatchNorm1d(16),
            nn.Linear(16, 8),
            nn.BatchNorm1d(8),
        )

    def forward(self, x):
        y = F.gelu(self.norm1(self.fc1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.norm2(self.fc2(y).transpose(-1, -2)).mT


class LowRankLinear(nn.Module):
    """LoRA's."""

    def __init__(self, width, rank=2, scale=0.5):
        super().__init__()
        self.base, self.drop, self.scale = nn.Linear(width, width), nn.Dropout(0.1), scale
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.drop(x))) * self.scale


@net(convs=2, **TOKENS)
def low_rank_updates():
    return nn.Sequential(LowRankLinear(8), nn.GELU(), LowRankLinear(8))


@net(convs=1, **TOKENS)
class norm_of_tokens(nn.Module):
    """A BatchNorm in the place of a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.BatchNorm1d(8), nn.Linear(8, 24)

    def forward(self, x):
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return torch.sigmoid(q) * k + v


@net(convs=1, norms=1, shape=(8, 6, 10), other=(8, 9, 10))
class linear_over_the_width(nn.Module):
    """Not a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(10, 10), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + F.relu(self.fc(self.norm(F.relu(x))))


@net(convs=2, shape=(6, 19), other=(6, 30))
def waves():
    first = nn.Conv1d(6, 8, 5, 2, 2, bias=False), nn.BatchNorm1d(8), nn.ReLU()
    return nn.Sequential(*first, Residual(nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.BatchNorm1d(8)))


@net(convs=1, shape=(4, 5, 6, 7), other=(4, 7, 5, 6))
class volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.norm = nn.Conv3d(4, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4)
        self.flat, self.gamma = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1)), nn.Parameter(torch.empty(4, 1, 1, 1))

    def forward(self, x):
        return x + self.gamma * (self.norm(self.wide(x)) + self.flat(x))


@net(convs=1)
class transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.norm = nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.small, self.gain = nn.ConvTranspose2d(8, 6, 2, 2), nn.Parameter(torch.empty(6, 1, 1))

    def forward(self, x):
        return torch.relu(self.norm(self.wide(x)) + self.gain * self.small(x))


@net(convs=1)
class online(nn.Module):
    """OREPA-like: the chain alone is not worth merging, beside the others it is."""

    def __init__(self):
        super().__init__()
        self.origin, self.down = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 2, 1, bias=False)
        self.up, self.pool = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.AvgPool2d(3, 1, 1)
        self.point, self.gains = nn.Conv2d(8, 8, 1, bias=False), nn.Parameter(torch.empty(4, 8, 1, 1))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        branches = [self.origin(x), self.up(self.down(x)), self.pool(self.point(x)), x]
        return torch.relu(self.norm(sum(self.gains[at] * branch for at, branch in enumerate(branches))))


@net(convs=2)
class norm_behind_global_pooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.pool, self.norm = conv_bn(8, 12, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(12)
        self.flatten, self.drop, self.head = nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.drop(self.flatten(self.norm(self.pool(F.relu(self.stem(x)))))))


@net(convs=2)
class norm_behind_the_mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = conv_bn(8, 12, 3, 2, 1), nn.BatchNorm1d(12), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.norm(F.relu(self.stem(x)).mean(dim=(2, 3))))


@net(convs=3)
class two_heads(nn.Module):
    """The stem's output goes out as well; the outputs have names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv_bn(8, 8, 3, 1, 1), nn.ReLU())
        self.boxes, self.scores = conv_bn(8, 4, 1), conv_bn(8, 3, 3, 1, 1)

    def forward(self, x):
        features = self.stem(x)
        return {"boxes": self.boxes(features), "more": (self.scores(features), [features])}


@net(convs=4)
class containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([conv_bn(8, 8, 3, 1, 1), conv_bn(8, 8, 1)]) for _ in range(3)])
        self.heads = nn.ModuleDict({"b": nn.Conv2d(8, 4, 1), "a": nn.Conv2d(8, 4, 1)})
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(4) for name in "ab"})
        self.act = nn.ReLU()

    def forward(self, x):
        for layer in self.layers:
            out = 0
            for branch in layer:
                out = out + branch(x)
            x = self.act(out)
        return torch.cat([self.norms[name](head(x)) for name, head in sorted(self.heads.items())], 1)


@net(convs=2)
class odd_order(nn.Module):
    """Registered in no order, the same activation used twice."""

    def __init__(self):
        super().__init__()
        self.bn2, self.act, self.bn1 = nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)
        self.conv2, self.unused = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Identity()
        self.conv1 = nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(x)) + x)


class Ghost(nn.Module):
    def __init__(self, read, written):
        super().__init__()
        self.primary = nn.Sequential(conv_bn(read, written // 2, 1), nn.ReLU())
        self.cheap = nn.Sequential(conv_bn(written // 2, written // 2, 3, 1, 1, written // 2), nn.ReLU())

    def forward(self, x):
        x1 = self.primary(x)
        x2 = self.cheap(x1)
        return torch.cat([x1, x2], dim=1)[:, :7, :, :]


@net(convs=3)
def ghosts():
    return nn.Sequential(Ghost(8, 8), conv_bn(7, 5, 1))


@net(convs=4)
class squeeze_excited(nn.Module):
    """The gate depends on the input: it is no constant."""

    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = conv_bn(8, 8, 3, 1, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.norm, self.project = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.conv(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.project(self.norm(x * gate))


@net(convs=3)
class timm_like(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_dw, self.norm = nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.ls, self.drop_path = LayerScale2d(8), DropPath(0.2)

    def forward(self, x):
        return x + self.drop_path(self.ls(self.fc2(F.gelu(self.fc1(self.norm(self.conv_dw(x)))))))


@net(convs=1)
def reflected():
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU())


@net(convs=1)
class dilated(nn.Module):
    def __init__(self):
        super().__init__()
        self.large, self.norm = nn.Conv2d(8, 8, 5, padding="same", groups=8), nn.BatchNorm2d(8)
        self.holes, self.small = (nn.Conv2d(8, 8, 3, padding=d, dilation=d, groups=8) for d in (2, 1))

    def forward(self, x):
        return torch.relu(self.norm(self.large(x)) + self.holes(x) + self.small(x))


@net(convs=2, norms=1)
class two_sources(nn.Module):
    """A sum over different tensors is no convolution of one, so the norm behind it stays."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm = conv_bn(8, 6, 3, 1, 1), conv_bn(8, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        return F.relu(self.norm(self.left(F.relu(x)) + self.right(F.relu(-x))))
