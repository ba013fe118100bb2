"""What several tests share."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomise_batch_norms(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random affine parameters and running statistics, as far as each BatchNorm has them."""
    for norm in batch_norms(module):
        _randomise_affine(norm, generator)
        if norm.running_mean is not None:
            norm.running_mean.copy_(_normal(norm.running_mean, generator))
            norm.running_var.copy_(_uniform(norm.running_var, 0.3, 3.0, generator))
    return module


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Tensor, seed: int = 0) -> nn.Module:
    """Random affine parameters, and statistics around those of a forward pass; leaves the model in eval mode.

    Wild statistics would make deep models overflow and test nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = batch_norms(model.eval())
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        _randomise_affine(norm, generator)
        norm.train().momentum = 1.0
    model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        spread = norm.running_var.sqrt()
        norm.running_mean += 0.1 * spread * _normal(norm.running_mean, generator)
        # A channel that the batch left dead would be amplified without measure by what the others' changes put in it.
        floor = 0.1 * norm.running_var.mean().item()
        norm.running_var.clamp_(min=floor).mul_(_uniform(norm.running_var, 0.8, 1.25, generator))
    return model


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]


@torch.no_grad()
def _randomise_affine(norm: _BatchNorm, generator: torch.Generator) -> None:
    if norm.affine:
        norm.weight.copy_(_uniform(norm.weight, 0.5, 1.5, generator))
        norm.bias.copy_(0.3 * _normal(norm.bias, generator))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _uniform(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float64).uniform_(low, high, generator=generator).to(like)
