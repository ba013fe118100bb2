"""Weight decay on the kernels that blocks fold to, in place of decay on their branches."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repblocks.blocks.base import RepConv
from repblocks.errors import ConfigurationError, FoldError
from repblocks.fusion import AffineConv, fold
from repblocks.verification import evaluating


def folded_decay(model: nn.Module) -> Tensor:
    """The sum over all blocks of ``|W|^2``, where W is the kernel that a block folds to by its running statistics.

    So it is the squared L2 norm of the convolution weights that ``deployed(model)`` holds in the places of the blocks.
    Gradients reach every branch, and the scales of the norms behind them; the running statistics are constants. Biases
    do not count, and neither do layers outside of blocks. A block inside another belongs to that.

    The ``get_custom_L2`` of RepVGG's published code is another quantity, for its 3x3-1x1 block only: the squares of
    the 3x3 branch's own weights but for their centre taps, without its norm's scale; and for the centres the squares of
    the two branches' scaled sum ``t3 * centre + t1 * pointwise``, over ``t3^2 + t1^2``. Its scales ``t`` of the norms
    are constants without gradients, and the identity branch does not count. Here all taps are scaled, all branches
    count and nothing is normalised, so a coefficient for the one does not suit the other.

    Args:
        model: In any mode; it is not changed.

    Returns:
        A number in the dtype of the weights, 0 without blocks.

    Raises:
        FoldError: A block does not fold, as where modules inside carry hooks.

    Source: Ding et al. 2021, "RepVGG", https://arxiv.org/abs/2101.03697, section 3.3, for what is folded; its code,
    https://github.com/DingXiaoH/RepVGG, for ``get_custom_L2``.
    """
    norms = [_kernel_of(block).weight.square().sum() for block in _blocks(model)]
    return torch.stack(norms).sum() if norms else torch.zeros(())


def decay_loss(model: nn.Module, config: Mapping[str, Any]) -> Tensor | float:
    """What the option ``folded_decay`` adds to a loss: ``rate / 2 * folded_decay(model)``; 0.0 where it is 0.

    Its gradient is ``rate`` times the folded kernel, as weight decay's is on a plain convolution. It passes through the
    optimizer as the loss's does, so for AdamW it is not decoupled as that one's own decay is.

    Args:
        model: What is trained.
        config: Of the optimizer.

    Raises:
        ConfigurationError: A rate that is none.
        FoldError: As in `folded_decay`.
    """
    rate = decay_rate(config)
    return 0.5 * rate * folded_decay(model) if rate else 0.0


def decay_rate(config: Mapping[str, Any]) -> float:
    """The option ``folded_decay`` of an optimizer's configuration; 0 where it is left out.

    Raises:
        ConfigurationError: It is no number, or negative.
    """
    rate = config.get("folded_decay", 0.0)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < float("inf"):
        raise ConfigurationError(
            f"optimizer.folded_decay={rate} needs to be a number, at least 0; 1e-4 is usual, 0 decays branches by "
            "optimizer.weight_decay"
        )
    return float(rate)


def require_folding(model: nn.Module) -> None:
    """Fold every block once, so that what does not fold is found before training.

    Raises:
        ConfigurationError: A block does not fold, or there is none.
    """
    blocks = _blocks(model)
    if not blocks:
        raise ConfigurationError(
            f"optimizer.folded_decay is for blocks with branches, and {type(model).__name__} has none; set "
            "optimizer.folded_decay=0, optimizer.weight_decay decays its weights"
        )
    names = {id(module): name for name, module in model.named_modules()}
    with torch.no_grad():
        for block in blocks:
            _require_fold(block, names[id(block)])


def _require_fold(block: RepConv, name: str) -> None:
    try:
        _kernel_of(block)
    except FoldError as error:
        raise ConfigurationError(
            f"optimizer.folded_decay needs blocks that fold in training, and {name or type(block).__name__} does not: "
            f"{error}; or set optimizer.folded_decay=0"
        ) from error


def block_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter inside a block, each once."""
    return list(dict.fromkeys(parameter for block in _blocks(model) for parameter in block.parameters()))


def _blocks(model: nn.Module) -> list[RepConv]:
    """The outermost blocks, each once."""
    return list(dict.fromkeys(_outermost(model)))


def _outermost(module: nn.Module) -> Iterator[RepConv]:
    if isinstance(module, RepConv):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _kernel_of(block: RepConv) -> AffineConv:
    inside = block.branches if block.form == "train" else block.conv
    with evaluating(block):  # by the running statistics
        return fold(inside, block.in_channels)
