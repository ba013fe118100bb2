"""UniRepLKNet as a network written after the paper's description, with the authors' names of weights."""

import itertools

import torch
from torch import Tensor, nn

# Size and dilation of the small kernels, by the size of the large one.
SMALL_KERNELS = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
}


def depthwise(channels: int, kernel_size: int, dilation: int = 1, *, bias: bool = False) -> nn.Conv2d:
    padding = dilation * (kernel_size - 1) // 2
    return nn.Conv2d(channels, channels, kernel_size, 1, padding, dilation, channels, bias=bias)


class ReferenceNorm(nn.Module):
    """LayerNorm over the channels of ``[N, C, H, W]``, spelled out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


class ReferenceMixer(nn.Module):
    def __init__(self, channels: int, kernel_size: int, form: str) -> None:
        super().__init__()
        self.lk_origin = depthwise(channels, kernel_size, bias=form == "deploy")
        self.small = SMALL_KERNELS[kernel_size] if form == "train" else ()
        if form == "train":
            self.origin_bn = nn.BatchNorm2d(channels)
        for size, dilation in self.small:
            self.add_module(f"dil_conv_k{size}_{dilation}", depthwise(channels, size, dilation))
            self.add_module(f"dil_bn_k{size}_{dilation}", nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lk_origin(x)
        y = self.origin_bn(y) if self.small else y
        for size, dilation in self.small:
            conv, norm = (self.get_submodule(f"dil_{part}_k{size}_{dilation}") for part in ("conv", "bn"))
            y = y + norm(conv(x))
        return y


class ReferenceResponse(nn.Module):
    """Over ``[N, H, W, C]``."""

    def __init__(self, channels: int, form: str) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.randn(1, 1, 1, channels)) if form == "train" else None

    def forward(self, x: Tensor) -> Tensor:
        norms = x.square().sum((1, 2), keepdim=True).sqrt()
        y = (self.gamma * norms / (norms.mean(-1, keepdim=True) + 1e-6) + 1) * x
        return y if self.beta is None else y + self.beta


class ReferenceGate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(nn.functional.adaptive_avg_pool2d(x, 1)))))


class ReferenceBlock(nn.Module):
    def __init__(self, channels: int, kernel_size: int, form: str) -> None:
        super().__init__()
        train = form == "train"
        plain = kernel_size < 7
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5) if train else None
        mixer = (
            depthwise(channels, kernel_size, bias=not train) if plain else ReferenceMixer(channels, kernel_size, form)
        )
        self.dwconv: nn.Module = mixer
        self.norm = nn.BatchNorm2d(channels) if train else nn.Identity()
        self.se = ReferenceGate(channels)
        self.pwconv1 = nn.Sequential(nn.Identity(), nn.Linear(channels, 4 * channels))
        self.act = nn.Sequential(nn.GELU(), ReferenceResponse(4 * channels, form))
        linear = nn.Linear(4 * channels, channels, bias=not train)
        norm = [nn.Identity(), nn.BatchNorm2d(channels)] if train else []
        self.pwconv2 = nn.Sequential(linear, *norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.norm(self.dwconv(x))).permute(0, 2, 3, 1)
        y = self.pwconv2[0](self.act(self.pwconv1(y))).permute(0, 3, 1, 2)
        y = self.pwconv2[1:](y)
        return x + (y if self.gamma is None else self.gamma[:, None, None] * y)


class Reference(nn.Module):
    """The network in one of its forms; ``downsample_layers.0`` is the stem."""

    def __init__(self, depths, widths, num_classes: int, form: str, kernel_sizes=(3, 13, 13, 13)) -> None:
        super().__init__()
        half = widths[0] // 2
        stem = [nn.Conv2d(3, half, 3, 2, 1), ReferenceNorm(half), nn.GELU()]
        stem += [nn.Conv2d(half, widths[0], 3, 2, 1), ReferenceNorm(widths[0])]
        self.downsample_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), ReferenceNorm(o)) for i, o in itertools.pairwise(widths)
        )
        self.downsample_layers.insert(0, nn.Sequential(*stem))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ReferenceBlock(width, size, form) for _ in range(depth)))
            for depth, width, size in zip(depths, widths, kernel_sizes, strict=True)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean((2, 3))))
