"""BatchNorm statistics over given inputs, exactly, without changing what a model computes in eval mode."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from repblocks.errors import ConfigurationError
from repblocks.expansion.expanded import Norm


class _Moments:
    """Mean and variance per channel over all pixels of all calls, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Merge the output of one more call; a forward hook."""
        pixels = output.detach().double().transpose(0, 1).flatten(1)
        count, mean = pixels.shape[1], pixels.mean(1)
        squares = (pixels - mean[:, None]).square().sum(1)
        total, distance = self.count + count, mean - self.mean.to(mean)
        self.squares = self.squares.to(mean) + squares + distance.square() * (self.count * count / total)
        self.mean = self.mean.to(mean) + distance * (count / total)
        self.count = total

    def variance(self) -> Tensor:
        """Unbiased, as BatchNorm's running variance is."""
        return self.squares / max(self.count - 1, 1)


@torch.no_grad()
def estimate_statistics(model: nn.Module, pairs: Sequence[tuple[nn.Module, Norm]], batches: Iterable[Tensor]) -> None:
    """Give norms the statistics of what they read over all batches together, keeping what they compute; in place.

    Args:
        model: Runs in eval mode, once per batch.
        pairs: Layers of the model, and the norms that read them. Norms without weight and bias are left out.
        batches: Inputs of the model.

    Raises:
        ConfigurationError: There are no batches.
    """
    moments = [_Moments() for _ in pairs]
    modes = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_hook(own) for (layer, _), own in zip(pairs, moments, strict=True)]
    try:
        model.eval()
        ran = [model(batch) is not None for batch in batches]
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if not ran:
        raise ConfigurationError("got no batches to estimate BatchNorm statistics from; give some, or batches=None")
    for (_, norm), own in zip(pairs, moments, strict=True):
        if own.count and None not in (norm.weight, norm.bias):
            _restate(norm, own)


def _restate(norm: Norm, moments: _Moments) -> None:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = norm.weight.double() * torch.rsqrt(variance.double() + norm.eps)
    shift = norm.bias.double() - mean.double() * scale
    mean.copy_(moments.mean)
    variance.copy_(moments.variance())
    norm.weight.copy_(scale * (variance.double() + norm.eps).sqrt())
    norm.bias.copy_(shift + mean.double() * scale)
