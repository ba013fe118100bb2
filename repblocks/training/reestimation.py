"""Precise BatchNorm: running statistics of the final weights, from a number of training batches."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # base of every BatchNorm

from repblocks.blocks.base import RepConv
from repblocks.calibration import batch_norms
from repblocks.errors import ConfigurationError, DataError
from repblocks.profiling import first_parameter_options


@torch.no_grad()
def reestimate(model: nn.Module, loader: Iterable[Any], batches: int) -> int:
    """Replace BatchNorm's running statistics by the plain average of those of training batches, in place.

    As ``torch.optim.swa_utils.update_bn`` does, which averages the batches' means and unbiased variances with equal
    weights, with one difference: dropout and stochastic depth are off, because the statistics serve a network that runs
    without them. Everything but the norms is in eval mode; blocks run merged or separately as `set_execution` says.
    Modes and momenta are put back afterwards, and the old statistics if a batch fails.

    It runs on one process: a SyncBatchNorm would wait for the others.

    Args:
        model: In any mode; a norm without running statistics is left alone, a frozen one is not.
        loader: Batches, whose first entry is the images ``[N, C, H, W]``, or which are the images.
        batches: How many to average; fewer where one pass over the loader has fewer.

    Returns:
        The number of batches that were averaged; 0 where there is no norm.

    Raises:
        ConfigurationError: ``batches`` is below 1.
        DataError: The loader has no batch.

    Source: Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", https://arxiv.org/abs/2105.07576, section 3.
    """
    if batches < 1:
        raise ConfigurationError(f"reestimate_bn={batches} needs to be at least 1 batch to average; 0 leaves it out")
    norms = [norm for norm in batch_norms(model) if norm.track_running_stats and norm.running_mean is not None]
    if not norms:
        return 0
    with _collecting(model, norms):
        return _run(model, loader, batches)


def _run(model: nn.Module, loader: Iterable[Any], batches: int) -> int:
    options, count = first_parameter_options(model), 0
    for count, batch in enumerate(islice(loader, batches), start=1):  # noqa: B007 - the count is the result
        images: Tensor = batch[0] if isinstance(batch, list | tuple) else batch
        model(images.to(**options))
    if not count:
        raise DataError("there is no training batch to re-estimate BatchNorm from; lower data.batch_size")
    return count


@contextmanager
def _collecting(model: nn.Module, norms: Sequence[_BatchNorm]) -> Generator[None]:
    """Norms average over all batches from here on; nothing else trains."""
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    old = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    try:
        _start(model, norms)
        yield
    except BaseException:
        for norm, buffers in zip(norms, old, strict=True):
            norm.load_state_dict(buffers, strict=False)
        raise
    finally:
        model.train(modes[model])  # modules that remember what they calculated in eval mode forget it
        for module, training in modes.items():
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _start(model: nn.Module, norms: Sequence[_BatchNorm]) -> None:
    model.eval()
    for module in model.modules():
        # A block in training mode runs merged; its mode says nothing to what is inside.
        module.training = isinstance(module, RepConv)
    for norm in norms:
        norm.reset_running_stats()
        norm.training, norm.momentum = True, None
