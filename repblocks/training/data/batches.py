"""Which images make up which batch: a function of the seed and the epoch, whatever the processes and workers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

Size = tuple[int, int]
"""Height and width in pixels."""

Batch = tuple[Tensor, Tensor, Tensor]
"""Images ``[N, C, H, W]``, labels ``[N]`` and the images' positions in their part of the dataset ``[N]``."""

IGNORED = -100
"""The label of an entry that is no image of the dataset; cross-entropy and torchmetrics leave it out by this number."""


class Loader(Protocol):
    """What trains and evaluates: batches, and how many."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches of one epoch."""
        ...

    def __len__(self) -> int:
        """Batches per epoch."""
        ...


class Draw(NamedTuple):
    """One image of a batch, and everything that its augmentation depends on.

    Attributes:
        epoch: Counted from 0.
        image: Position in the part of the dataset.
        size: What the image is resized to.
        counts: False where the image only fills up a process's share of an evaluation.
    """

    epoch: int
    image: int
    size: Size
    counts: bool = True


@dataclass(frozen=True)
class Share:
    """One process's part of a distributed job."""

    rank: int = 0
    processes: int = 1


def batches_per_epoch(images: int, *, batch_size: int, processes: int, drop_last: bool) -> int:
    """Batches that each of the processes sees in an epoch; ``batch_size`` is that of one process."""
    batches = images / (batch_size * processes)
    return math.floor(batches) if drop_last else math.ceil(batches)


class EpochBatches(Sampler[list[Draw]]):
    """One process's batches of shuffled epochs; it stops and resumes at any batch.

    The order of an epoch is a permutation of all images, drawn from the seed and the epoch. It is cut into batches of
    the whole job, and those into one contiguous slice per process, so ``n`` processes with batches of ``b`` see
    together what one process with batches of ``n * b`` sees. Unless it is dropped, an incomplete last batch is shared
    out evenly; it takes images from the start of the permutation where it does not divide.

    Args:
        images: Number of images.
        batch_size: Of one process.
        share: Which process this is.
        seed: The run's.
        drop_last: Whether an incomplete last batch is left out.
        size_at: The images' size in an epoch.
        epoch: The first epoch.
        position: Where the first epoch begins, in images of the whole job.
    """

    def __init__(
        self,
        images: int,
        *,
        batch_size: int,
        share: Share,
        seed: int,
        drop_last: bool,
        size_at: Callable[[int], Size],
        epoch: int = 0,
        position: int = 0,
    ) -> None:
        self.images, self.batch_size, self.share, self.seed = images, batch_size, share, seed
        self.drop_last, self.size_at = drop_last, size_at
        self.load_state_dict({"epoch": epoch, "position": position})

    @property
    def sampler(self) -> "EpochBatches":
        """Itself: Lightning announces epochs to ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the next one, from its beginning; the epoch that is under way goes on."""
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and the position in it in images of the whole job."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration begin where ``state`` was taken; the end of an epoch is the start of the next."""
        self.epoch, self.position = state["epoch"], state["position"]
        if self.position and not self._places(self.position):
            self.epoch, self.position = self.epoch + 1, 0
        self._start = self.position

    def __len__(self) -> int:
        return batches_per_epoch(
            self.images, batch_size=self.batch_size, processes=self.share.processes, drop_last=self.drop_last
        )

    def __iter__(self) -> Iterator[list[Draw]]:
        self.position = self._start
        return self._batches()

    def _batches(self) -> Iterator[list[Draw]]:
        # Loaders make iterators that they throw away; only one that is used takes up the start.
        start, self._start = self._start, 0
        epoch, places = self.epoch, self._places(start)
        order, size = self._order(epoch), self.size_at(epoch)
        for place in places:
            self.position = min(place + places.step, self.images)
            yield [Draw(epoch, image, size) for image in self._slice(order, place)]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.images)

    def _slice(self, order: np.ndarray, position: int) -> list[int]:
        each = min(self.batch_size, math.ceil((self.images - position) / self.share.processes))
        first = position + self.share.rank * each
        return order.take(range(first, first + each), mode="wrap").tolist()

    def _places(self, start: int) -> range:
        """Where the batches of the job begin."""
        whole = self.batch_size * self.share.processes
        return range(start, self.images - whole + 1 if self.drop_last else self.images, whole)


class EvaluationBatches(Sampler[list[Draw]]):
    """One process's batches of an evaluation, in order; together the processes see every image once.

    Process ``r`` of ``n`` gets images ``r``, ``r + n``, ... Where that gives some processes one image less,
    they get one more that does not count, so that none waits for the others.
    """

    def __init__(self, images: int, *, batch_size: int, share: Share, size: Size) -> None:
        self.images, self.batch_size, self.share, self.size = images, batch_size, share, size

    def state_dict(self) -> dict[str, Any]:
        """Nothing: an evaluation that was interrupted starts over."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start over."""

    def __len__(self) -> int:
        return math.ceil(self._images_per_process() / self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        share = self.share
        places = range(share.rank, self._images_per_process() * share.processes, share.processes)
        for first in range(0, len(places), self.batch_size):
            yield [self._draw(place) for place in places[first : first + self.batch_size]]

    def _images_per_process(self) -> int:
        return math.ceil(self.images / self.share.processes)

    def _draw(self, place: int) -> Draw:
        return Draw(0, place % self.images, self.size, counts=place < self.images)
