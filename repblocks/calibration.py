"""Statistics as after training, for models that were not trained: at initialisation BatchNorm hides every mistake."""

import torch
from timm.layers import LayerScale2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # base of every BatchNorm


@torch.no_grad()
def randomise(module: nn.Module, generator: Generator) -> nn.Module:
    """Draw what starts at 0 or 1: layer scales, affine parameters and running statistics of BatchNorm. In place."""
    _randomise_scales(module, generator)
    for norm in batch_norms(module):
        _randomise_affine(norm, generator)
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(_normal(norm.running_mean, generator))
            norm.running_var.copy_(_uniform(norm.running_var, 0.3, 3.0, generator))
    return module


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Tensor, seed: int = 0) -> nn.Module:
    """Draw affine parameters, and statistics around those of a forward pass. In place, and left in eval mode.

    Wild statistics would make deep models overflow and test nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    _randomise_scales(model, generator)
    norms = [norm for norm in batch_norms(model) if norm.running_mean is not None]
    for norm in norms:
        _randomise_affine(norm, generator)
    reestimate(model, inputs)
    for norm in norms:
        _perturb_statistics(norm, generator)
    return model


@torch.no_grad()
def reestimate(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Take the running statistics of one forward pass. In place, and left in eval mode."""
    norms = [norm for norm in batch_norms(model.eval()) if norm.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return model


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm inside."""
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]


def _perturb_statistics(norm: _BatchNorm, generator: Generator) -> None:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    mean += 0.1 * variance.sqrt() * _normal(mean, generator)
    # A channel that the batch left dead would be amplified without measure by what the others' changes put in it.
    floor = 0.1 * variance.mean().item()
    variance.clamp_(min=floor).mul_(_uniform(variance, 0.8, 1.25, generator))


def _randomise_scales(module: nn.Module, generator: Generator) -> None:
    for layer in module.modules():
        if isinstance(layer, LayerScale2d):
            layer.gamma.copy_(_uniform(layer.gamma, 0.5, 1.5, generator))


def _randomise_affine(norm: _BatchNorm, generator: Generator) -> None:
    if norm.affine:
        norm.weight.copy_(_uniform(norm.weight, 0.5, 1.5, generator))
        norm.bias.copy_(0.3 * _normal(norm.bias, generator))


def _normal(like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _uniform(like: Tensor, low: float, high: float, generator: Generator) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float64).uniform_(low, high, generator=generator).to(like)
