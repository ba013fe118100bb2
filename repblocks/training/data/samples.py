"""From a draw to an entry of a batch: read, augment, label."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from repblocks.errors import DataError
from repblocks.training.data.batches import IGNORED, Draw, Size
from repblocks.training.data.randomness import generators_kept, seed_for
from repblocks.training.data.reading import LoadingError, Reporter
from repblocks.training.data.transforms import Transform

Sample = tuple[Tensor, int, int]
"""An image ``[C, H, W]``, its label and its position in the part of the dataset."""


class TrainingSamples(Dataset[Sample]):
    """Augmented images: what a draw gives depends on the seed and the draw, not on who asks or in which order.

    Args:
        images: Pairs of an image and its label.
        transform_at: Augmentation and preprocessing for a size.
        seed: The run's.
        report: Called for an image that cannot be read; if it returns, the next readable one takes its place.
    """

    def __init__(self, images: Any, transform_at: Callable[[Size], Transform], seed: int, report: Reporter) -> None:
        self.images, self.transform_at, self.seed, self.report = images, transform_at, seed, report

    def __getitem__(self, draw: Draw) -> Sample:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[Sample]:
        """The images of a batch; torch's loaders call this where it exists."""
        with generators_kept():
            return [self._sample(draw) for draw in draws]

    def _sample(self, draw: Draw) -> Sample:
        index, (image, label) = self._readable(draw.image)
        seed_for(self.seed, draw.epoch, draw.image)
        return self.transform_at(draw.size)(image), label, index

    def _readable(self, index: int) -> tuple[int, tuple[Image, int]]:
        for step in range(len(self.images)):
            place = (index + step) % len(self.images)
            try:
                return place, self.images[place]
            except DataError as error:
                self.report(error)
        raise LoadingError("none of the training images can be read; check data.root")


class EvaluationSamples(Dataset[Sample]):
    """Images as they are evaluated; one that cannot be read has the label that is left out.

    Args:
        images: Pairs of an image and its label.
        transform: Preprocessing.
        channels: Of the images.
        report: Called for an image that cannot be read.
    """

    def __init__(self, images: Any, transform: Transform, channels: int, report: Reporter) -> None:
        self.images, self.transform, self.channels, self.report = images, transform, channels, report

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Sample:
        if not draw.counts:
            return blank(self.channels, draw.size), IGNORED, draw.image
        try:
            image, label = self.images[draw.image]
        except DataError as error:
            self.report(error)
            return blank(self.channels, draw.size), IGNORED, draw.image
        return self.transform(image), label, draw.image


def blank(channels: int, size: Size) -> Tensor:
    """An image ``[C, H, W]`` of the colour that preprocessing makes zero."""
    return torch.zeros(channels, *size)
