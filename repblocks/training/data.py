"""Batches for training and evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repblocks.errors import ConfigurationError, DataError
from repblocks.training.datasets import Images, Splits, load_splits
from repblocks.training.transforms import Preprocessing, Transform

Loader = DataLoader[Any]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The ``data`` group of the configuration; ``configs/data/`` documents each value."""

    name: str
    image_size: int | Sequence[int]
    in_chans: int
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_pct: float
    batch_size: int
    workers: int
    drop_last: bool
    augment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    root: str | None = None
    download: bool = False

    def preprocessing(self) -> Preprocessing:
        """The part of it that travels with the model."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return Preprocessing(
            input_size=(self.in_chans, height, width),
            mean=tuple(self.mean),
            std=tuple(self.std),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
        )


class ImageData(pl.LightningDataModule):
    """Batches ``(images [N, C, H, W], labels [N])`` of the three splits.

    Args:
        config: Dataset, preprocessing, augmentation and batching.

    Raises:
        ConfigurationError: Unknown dataset or augmentation, or impossible batching.
        DataError: Missing, empty or inconsistent files, or fewer training images than one batch.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        if config.batch_size < 1 or config.workers < 0:
            raise ConfigurationError(
                f"data.batch_size={config.batch_size} and data.workers={config.workers} need to be at least 1 and 0"
            )
        self.config = config
        self.preprocessing = config.preprocessing()
        self.splits: Splits = load_splits(
            config.name, root=config.root, download=config.download, in_chans=config.in_chans
        )
        self._train = _Transformed(self.splits.train, self.preprocessing.train_transform(config.augment))
        self.training_batches()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the labels."""
        return self.splits.class_names

    def training_batches(self, processes: int = 1) -> int:
        """Batches per epoch that each of ``processes`` sees.

        Raises:
            DataError: There would be none.
        """
        share = math.ceil(len(self._train) / processes)
        batches = share / self.config.batch_size
        count = math.floor(batches) if self.config.drop_last else math.ceil(batches)
        if not count:
            raise DataError(
                f"{len(self._train)} training images on {processes} process(es) do not fill one batch of "
                f"data.batch_size={self.config.batch_size}; lower it, or set data.drop_last=false"
            )
        return count

    def train_dataloader(self) -> Loader:
        """Shuffled and augmented; an incomplete last batch is dropped if the configuration says so."""
        return self._loader(self._train, shuffle=True, drop_last=self.config.drop_last)

    def val_dataloader(self) -> Loader:
        """Every validation image once."""
        return self._loader(_Transformed(self.splits.val, self.preprocessing.eval_transform()))

    def test_dataloader(self) -> Loader:
        """Every test image once."""
        return self._loader(_Transformed(self.splits.test, self.preprocessing.eval_transform()))

    def test_images(self, count: int) -> Tensor:
        """At most ``count`` test images ``[N, C, H, W]``, evenly spaced because folders are sorted by class."""
        images = _Transformed(self.splits.test, self.preprocessing.eval_transform())
        return torch.stack([images[i][0] for i in range(0, len(images), math.ceil(len(images) / count))])

    def _loader(self, images: "_Transformed", **options: Any) -> Loader:
        return DataLoader(
            images,
            batch_size=self.config.batch_size,
            num_workers=self.config.workers,
            persistent_workers=self.config.workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


class _Transformed(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Images, transform: Transform) -> None:
        self.images: Any = images  # torch's Dataset promises no length, ours have one
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label
