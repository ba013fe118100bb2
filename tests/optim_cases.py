"""Networks, optimizers and batches for the tests of multiplied gradients."""

import itertools

import torch
from support import randomise_batch_norms
from timm.optim import create_optimizer_v2
from torch import nn

import repblocks as rb
from repblocks.blocks.csla import CSLAConv
from repblocks.optim import RepOptimizer

SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
LINEAR = {
    "torch, Nesterov": lambda p: torch.optim.SGD(p, **SETTINGS, nesterov=True),
    "torch, dampening": lambda p: torch.optim.SGD(p, **SETTINGS, dampening=0.5),
    "torch, foreach": lambda p: torch.optim.SGD(p, **SETTINGS, foreach=True),
    "torch, fused": lambda p: torch.optim.SGD(p, **SETTINGS, fused=True),
    "torch, without momentum": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    "timm sgd": lambda p: create_optimizer_v2(p, "sgd", **SETTINGS),
    "timm momentum": lambda p: create_optimizer_v2(p, "momentum", **SETTINGS),
    "timm sgdw": lambda p: create_optimizer_v2(p, "sgdw", **SETTINGS),
    "timm sgdc": lambda p: create_optimizer_v2(p, "sgdc", **SETTINGS),
}
GEOMETRIES = [
    {},
    {"groups": 2},
    {"groups": 4},
    {"stride": 2},
    {"kernel_size": 4},
    {"kernel_size": (1, 5)},
    {"kernel_size": 1},
    {"padding": ((1, 0), (2, 0))},
    {"dilation": 2, "padding": ((1, 3), (2, 2))},  # an identity between the taps makes the kernel denser
    {"padding_mode": "reflect"},
]


def net(kernel_size=3, **geometry):
    """Two blocks with ReLUs between, constants that differ by channel, in float64 and training mode."""
    torch.manual_seed(0)
    first, second = CSLAConv(4, 8, kernel_size, **geometry), CSLAConv(8, 8, kernel_size, **{**geometry, "stride": 1})
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *head).double()
    return randomise_batch_norms(model, torch.Generator().manual_seed(0)).train()


def sgd(model):
    return torch.optim.SGD(model.parameters(), **SETTINGS)


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 7, 4, 9, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 3, (5, 7), generator=generator)
    return itertools.islice(itertools.cycle(zip(images, labels, strict=True)), steps)


def loss_of(model, batch):
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def train(model, optimizer, steps, sign=1):
    for batch in batches(steps):
        optimizer.zero_grad()
        (sign * loss_of(model, batch)).backward()
        optimizer.step()
    return model


def difference(branched, plain):
    """The largest relative difference of kernels, and of the parameters that both have."""
    pairs = [(branched[-1].weight, plain[-1].weight), (branched[-1].bias, plain[-1].bias)]
    for block, twin in zip(branched, plain, strict=True):
        if isinstance(block, CSLAConv):
            pairs.append((rb.fold(block.branches[0], block.in_channels).weight, twin.branches[0].weight))
            pairs += zip(block.branches[1].state_dict().values(), twin.branches[1].state_dict().values(), strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def after_backward():
    """A plain twin and its optimizer, between a backward pass and the step."""
    plain, optimizer = RepOptimizer.for_plain(net(), sgd)
    loss_of(plain, next(batches(1))).backward()
    return plain, optimizer
