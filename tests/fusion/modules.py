"""Modules to fold."""

import torch
from support import randomise_batch_norms
from torch import nn


def conv_norm(read: int, written: int, kernel_size, **geometry) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(read, written, kernel_size, **geometry), nn.BatchNorm2d(written))


def prepared(module: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and eval mode, with random weights and random BatchNorms."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return randomise_batch_norms(module, generator).eval()
