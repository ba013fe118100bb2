"""What BatchNorm does with the mean and variance of a batch: normalise, keep running statistics, synchronise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and (co)variance of a vector over the positions of a batch, on all processes that synchronise.

    Attributes:
        mean: ``[groups, P]``.
        covariance: ``[groups, P, P]``, or only its diagonals ``[groups, P]``.
        count: Positions.
        group: The processes that shared their sums, or None.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    group: dist.ProcessGroup | None = None

    @property
    def variance(self) -> Tensor:
        """``[groups, P]``."""
        whole = self.covariance.ndim > self.mean.ndim
        return self.covariance.diagonal(dim1=-2, dim2=-1) if whole else self.covariance

    def summed(self, gradient: Tensor) -> Tensor:
        """A gradient of the moments, over all processes that they belong to."""
        if self.group is not None:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=self.group)
        return gradient


def synchronised(local: Moments, group: dist.ProcessGroup | None) -> Moments:
    """The moments of the positions of all processes of a group from those of each: ``(M, sum u, sum u u^T)``."""
    if group is None:
        return local
    deviation_of = _squared if local.covariance.ndim == local.mean.ndim else _outer
    sums = torch.cat([local.mean.new_tensor([float(local.count)]), (local.count * local.mean).flatten()])
    dist.all_reduce(sums, group=group)
    count = round(sums[0].item())
    mean = sums[1:].view_as(local.mean) / count
    scatter = local.count * (local.covariance + deviation_of(local.mean - mean))
    dist.all_reduce(scatter, group=group)
    return Moments(mean, scatter / count, count, group)


def _squared(deviation: Tensor) -> Tensor:
    return deviation * deviation


def _outer(deviation: Tensor) -> Tensor:
    return deviation.unsqueeze(-1) * deviation.unsqueeze(-2)


def group_of(norm: nn.Module) -> dist.ProcessGroup | None:
    """The processes that a norm shares its statistics with, None if it keeps to its own."""
    if not isinstance(norm, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def require_statistics(count: int, shape: Sequence[int]) -> None:
    """Refuse a batch of one position, as BatchNorm does.

    Raises:
        ValueError: There is one value per channel, which has no variance.
    """
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


def remember(norms: Sequence[nn.BatchNorm2d], means: Sequence[Tensor], variances: Sequence[Tensor], count: int) -> None:
    """Move the running statistics towards those of the batch, the variances unbiased: ``v * M / (M - 1)``."""
    found = zip(norms, means, variances, strict=True)
    tracked = [entry for entry in found if entry[0].training and entry[0].track_running_stats]
    counters = [norm.num_batches_tracked for norm, _, _ in tracked if norm.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)  # pyright: ignore  # as torch.optim does
    kept = [entry for entry in tracked if entry[0].running_mean is not None]
    by_share: dict[float, list[tuple[nn.BatchNorm2d, Tensor, Tensor]]] = {}
    for entry in kept:
        by_share.setdefault(_share(entry[0]), []).append(entry)
    unbiased = count / max(count - 1, 1)
    for share, entries in by_share.items():
        running = [t for norm, _, _ in entries for t in (norm.running_mean, norm.running_var) if t is not None]
        batch = [t for _, mean, variance in entries for t in (mean, variance * unbiased)]
        torch._foreach_lerp_(running, batch, share)  # pyright: ignore


def _share(norm: nn.BatchNorm2d) -> float:
    if norm.momentum is not None:
        return norm.momentum
    assert norm.num_batches_tracked is not None
    return 1.0 / float(norm.num_batches_tracked)
