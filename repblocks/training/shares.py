"""What the branches of each block contribute, epoch by epoch."""

import pytorch_lightning as pl
from torch import nn

from repblocks.blocks.base import RepConv
from repblocks.blocks.shares import branch_shares, has_parallel_branches
from repblocks.training.task import ClassificationTask


class BranchShares(pl.Callback):
    """Log `branch_shares` of every block at the end of each training epoch, as ``share/MODULE/BRANCH``.

    In a distributed run they are those of the first process, whose BatchNorm statistics are also those that are saved.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fold the branches of the weights as they are now, and log their shares."""
        assert isinstance(pl_module, ClassificationTask)
        shares = shares_of(pl_module.model) if trainer.is_global_zero else {}
        pl_module.log_dict(trainer.strategy.broadcast(shares), sync_dist=True, logger=False)


def shares_of(model: nn.Module) -> dict[str, float]:
    """The shares of every block with parallel branches inside a model, under the names that they are logged by."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, RepConv)}
    return {
        f"share/{name}/{branch}": share
        for name, block in blocks.items()
        if has_parallel_branches(block)
        for branch, share in branch_shares(block).items()
    }
