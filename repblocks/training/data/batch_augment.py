"""Augmentation of whole batches of bytes, on whatever device they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from repblocks.errors import ConfigurationError
from repblocks.training.data.randomness import entropy
from repblocks.training.data.transforms import Preprocessing, outside


def normalised(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Bytes ``[N, C, H, W]`` as a network's input: float32 with the dataset's mean and deviation taken out."""
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    return (images / 255 - mean) / std


@dataclass(frozen=True, kw_only=True)
class BatchAugmentation:
    """Padded random crop, horizontal flip, normalisation and cutout.

    An image's random numbers are its row of a table that the seed and the epoch determine: neither batches nor the
    device or the number of processes change what becomes of it.

    Attributes:
        preprocessing: For the normalisation.
        images: Rows of the table, the number of training images.
        seed: The run's.
        padding: Pixels of black added to every side before the crop.
        flip: Probability.
        cutout: Side of the square that is set to zero, in pixels.
    """

    preprocessing: Preprocessing
    images: int
    seed: int
    padding: int = 0
    flip: float = 0.0
    cutout: int = 0

    @classmethod
    def of(
        cls, augment: Mapping[str, Any], *, preprocessing: Preprocessing, images: int, seed: int
    ) -> "BatchAugmentation":
        """What ``data.augment`` asks for.

        Raises:
            ConfigurationError: A kind of augmentation that exists per image only.
        """
        lacking = [key for key, value in augment.items() if key not in _OURS and not _is_off(key, value)]
        if lacking:
            raise ConfigurationError(
                f"data.augment has {', '.join(lacking)}, which images in memory cannot be augmented with: they know "
                f"{', '.join(_OURS)}; set data.in_memory=false, or take it out"
            )
        ours = {name: augment.get(key) or 0 for key, name in _OURS.items()}
        return cls(preprocessing=preprocessing, images=images, seed=seed, **ours)

    def __call__(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Augment a batch.

        Args:
            images: Bytes ``[N, C, H, W]``.
            indices: The images' positions in the dataset ``[N]``.
            epoch: Counted from 0.

        Returns:
            float32 ``[N, C, H, W]`` on the same device.
        """
        numbers = random_table(self.seed, epoch, self.images)[indices.cpu()].to(images.device)
        augmented = normalised(self._cropped(images, numbers), self.preprocessing)
        return augmented * self._holes(numbers, images.shape) if self.cutout else augmented

    def _cropped(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Crop and flip by reading every pixel from its place in the padded image."""
        count, channels, height, width = images.shape
        down, right = whole_numbers(numbers[:, :2], 2 * self.padding + 1).unbind(1)
        columns = torch.arange(width, device=images.device).expand(count, width)
        columns = torch.where(numbers[:, 2:3] < self.flip, columns.flip(1), columns) + right[:, None]
        rows = torch.arange(height, device=images.device) + down[:, None]
        padded = pad(images, [self.padding] * 4).flatten(2)
        places = rows[:, :, None] * (width + 2 * self.padding) + columns[:, None]
        return padded.gather(2, places.flatten(1)[:, None].expand(-1, channels, -1)).view(images.shape)

    def _holes(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        rows, columns = (self._outside(numbers[:, 3 + axis], shape[2 + axis]) for axis in (0, 1))
        return rows[:, None, :, None] | columns[:, None, None]

    def _outside(self, numbers: Tensor, length: int) -> Tensor:
        return outside(whole_numbers(numbers, length)[:, None], self.cutout, length)


@lru_cache(maxsize=2)
def random_table(seed: int, epoch: int, images: int) -> Tensor:
    """Numbers in [0, 1) ``[images, 5]``: crop's row and column, flip, hole's row and column."""
    return torch.rand(images, 5, generator=torch.Generator().manual_seed(entropy(seed, epoch)))


def whole_numbers(numbers: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1) as whole ones below ``count``, each as likely as the others."""
    return (numbers * count).long()


def _is_off(key: str, value: Any) -> bool:
    return not value or value == _WITHOUT_EFFECT.get(key)


_OURS: Mapping[str, str] = {"padding": "padding", "hflip": "flip", "cutout": "cutout"}

_WITHOUT_EFFECT: Mapping[str, Any] = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
