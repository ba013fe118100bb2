"""Batches for training and evaluation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repblocks.errors import ConfigurationError, DataError
from repblocks.names import known_name
from repblocks.training.datasets import Images, Splits, load_splits
from repblocks.training.transforms import Preprocessing, Transform

Loader = DataLoader[Any]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The ``data`` group of the configuration; ``configs/data/`` documents each value.

    Raises:
        ConfigurationError: A value of a wrong kind or out of range.
    """

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

    def __post_init__(self) -> None:
        for key, (fits, needed) in _CHECKS.items():
            if not fits(getattr(self, key)):
                raise ConfigurationError(f"data.{key}={getattr(self, key)} needs to be {needed}; see configs/data/")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "DataConfig":
        """The configuration in ``values``.

        Raises:
            ConfigurationError: A key that does not exist, one that is missing, or a wrong value.
        """
        for key in values:
            known_name("data", key, [known.name for known in fields(cls)])
        required = [known.name for known in fields(cls) if known.default is known.default_factory is MISSING]
        if missing := [key for key in required if key not in values]:
            raise ConfigurationError(f"the data group lacks {', '.join(missing)}; add +data.KEY=VALUE for each")
        return cls(**values)

    def preprocessing(self) -> Preprocessing:
        """The part of it that travels with the model; gray images of colour statistics get their averages."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return Preprocessing(
            input_size=(self.in_chans, height, width),
            mean=_for_channels(self.in_chans, self.mean),
            std=_for_channels(self.in_chans, self.std),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
        )


def _for_channels(channels: int, values: Sequence[float]) -> tuple[float, ...]:
    """One value per channel where gray and colour meet; other counts stay, and are refused later."""
    if {channels, len(values)} == {1, 3}:
        return (sum(values) / len(values),) * channels
    return tuple(values)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_size(value: Any) -> bool:
    sides = cast("list[Any]", value if isinstance(value, list | tuple) else [value, value])
    return len(sides) == 2 and all(_is_whole(side, 1) for side in sides)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in cast("list[Any]", value))


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "image_size": (_is_size, "a number of pixels, or [height, width]"),
    "in_chans": (lambda value: _is_whole(value, 1), "a whole number, at least 1"),
    "mean": (_are_numbers, "a list of numbers, one per channel"),
    "std": (_are_numbers, "a list of numbers, one per channel"),
    "crop_pct": (lambda value: isinstance(value, int | float) and 0 < value <= 1, "above 0 and at most 1"),
    "batch_size": (lambda value: _is_whole(value, 1), "a whole number, at least 1"),
    "workers": (lambda value: _is_whole(value, 0), "a whole number, at least 0"),
    "drop_last": (lambda value: isinstance(value, bool), "true or false"),
    "augment": (lambda value: isinstance(value, Mapping), "a group of values"),
}


class ImageData(pl.LightningDataModule):
    """Batches ``(images [N, C, H, W], labels [N])`` of the three splits.

    Args:
        config: Dataset, preprocessing, augmentation and batching.

    Raises:
        ConfigurationError: Unknown dataset or augmentation.
        DataError: Missing, empty or inconsistent files.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = config.preprocessing()
        self.splits: Splits = load_splits(
            config.name, root=config.root, download=config.download, in_chans=config.in_chans
        )
        self._train = _Transformed(self.splits.train, self.preprocessing.train_transform(config.augment))

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
