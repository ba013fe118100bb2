"""Datasets that are held in memory as one array, and their batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from repblocks.training.data.batches import IGNORED, Batch, Draw, EpochBatches, EvaluationBatches


class ArrayImages(Dataset[tuple[Image.Image, int]]):
    """Images of one size, as bytes ``[N, H, W, C]`` with their labels; an entry is a picture and its label."""

    def __init__(self, pixels: NDArray[np.uint8], labels: Sequence[int]) -> None:
        self.pixels, self.labels = pixels, list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self.labels[index]

    def part(self, indices: Sequence[int]) -> "ArrayImages":
        """Some of the images, in the order of ``indices``."""
        return ArrayImages(self.pixels[indices], [self.labels[index] for index in indices])

    def bytes(self) -> Tensor:
        """All images ``[N, C, H, W]``, uint8."""
        return torch.from_numpy(self.pixels).permute(0, 3, 1, 2).contiguous()


class MemoryLoader:
    """Batches cut from one tensor; where an epoch was interrupted, it can be resumed.

    Args:
        images: All of them.
        batches: Which images make up which batch.
        finish: Applied to the bytes ``[N, C, H, W]`` of each batch.
    """

    def __init__(
        self,
        images: ArrayImages,
        batches: EpochBatches | EvaluationBatches,
        finish: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> None:
        self.images, self.labels = images.bytes(), torch.tensor(images.labels)
        self.batch_sampler, self.finish = batches, finish

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        # The sampler is asked at once, so that a state taken before the first batch is this epoch's.
        return map(self._batch, iter(self.batch_sampler))

    def _batch(self, draws: list[Draw]) -> Batch:
        indices = torch.tensor([draw.image for draw in draws])
        counts = torch.tensor([draw.counts for draw in draws])
        labels = self.labels[indices].where(counts, torch.tensor(IGNORED))
        return self.finish(self.images.index_select(0, indices)), labels, indices

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands."""
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration begin where ``state`` was taken."""
        self.batch_sampler.load_state_dict(state)
