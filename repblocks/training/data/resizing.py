"""Progressive resizing: training on small images first, and on large ones when the details matter."""

from dataclasses import dataclass

from repblocks.training.data.batches import Size

STEP = 32
"""Pixels; networks halve their input five times."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Image sizes that grow with the epochs: ``start`` at first, ``end`` from epoch ``epochs`` on.

    Between them each side grows linearly, in steps of ``STEP`` pixels.

    Source: Tan and Le 2021, "EfficientNetV2", https://arxiv.org/abs/2104.00298, section 4.
    """

    start: Size
    end: Size
    epochs: float

    def __call__(self, epoch: int) -> Size:
        """The size of training images in an epoch, counted from 0."""
        if epoch >= self.epochs:
            return self.end
        height, width = (
            first + int((last - first) * epoch / self.epochs) // STEP * STEP
            for first, last in zip(self.start, self.end, strict=True)
        )
        return height, width
