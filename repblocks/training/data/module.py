"""Batches for training and evaluation."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor

from repblocks.errors import ConfigurationError, DataError
from repblocks.training.data.batch_augment import BatchAugmentation, normalised
from repblocks.training.data.batches import (
    IGNORED,
    Draw,
    EpochBatches,
    EvaluationBatches,
    Loader,
    Share,
    Size,
    batches_per_epoch,
)
from repblocks.training.data.config import DataConfig
from repblocks.training.data.datasets import load_splits
from repblocks.training.data.loaders import stateful_loader
from repblocks.training.data.memory import ArrayImages, MemoryLoader
from repblocks.training.data.reading import Reporter
from repblocks.training.data.samples import EvaluationSamples, TrainingSamples
from repblocks.training.data.shards import Shards
from repblocks.training.data.splits import Part, Splits, size_of
from repblocks.training.data.streams import EvaluationLoader, EvaluationStream, TrainingLoader, TrainingStream
from repblocks.training.data.timm_datasets import SplitNames
from repblocks.training.data.transforms import Preprocessing, Transform


class ImageData(pl.LightningDataModule):
    """Batches of the three splits: images ``[N, C, H, W]``, labels ``[N]`` and positions in the split ``[N]``.

    What an image becomes in an epoch depends on the seed, the epoch and the image, whatever the number of processes
    and workers and wherever a run was interrupted. (Shards are the exception: there it also depends on which stream
    reads the image.) Training loaders have ``state_dict`` and ``load_state_dict``. An entry that is no image of the
    split, but fills up a process's share of an evaluation or stands for an image that cannot be read, has the label
    ``IGNORED``.

    Args:
        config: Dataset, preprocessing, augmentation and batching.
        seed: Of the order of the images and their augmentation.
        epochs: Length of the training, for sizes that grow with it.

    Raises:
        ConfigurationError: Unknown dataset or augmentation.
        DataError: Missing, empty or inconsistent files.
    """

    def __init__(self, config: DataConfig, seed: int = 0, epochs: int = 1) -> None:
        super().__init__()
        self.config, self.seed, self.epochs = config, seed, epochs
        self.preprocessing = config.preprocessing()
        self.size_at = config.growth(epochs)
        names = SplitNames(
            train=config.train_split, val=config.val_split, test=config.test_split, classes=config.classes
        )
        self.splits: Splits = load_splits(
            config.name, root=config.root, download=config.download, in_chans=config.in_chans, names=names
        )
        self._report = Reporter(config.bad_images)
        self._position = 0
        self._in_batches = self._batch_augmentation() if config.in_memory else None
        self._transforms = _Transforms(self.preprocessing, config.augment)
        self._transforms(self.size_at(0))  # wrong names of augmentation come out now, not in a worker

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the labels."""
        return self.splits.class_names

    def training_batches(self, processes: int = 1) -> int:
        """Batches per epoch that each of ``processes`` sees.

        Raises:
            DataError: There would be none.
        """
        images, batch_size = size_of(self.splits.train), self.config.batch_size
        count = batches_per_epoch(images, batch_size=batch_size, processes=processes, drop_last=self.config.drop_last)
        if not count:
            raise DataError(
                f"{images} training images on {processes} process(es) do not fill one batch of "
                f"data.batch_size={batch_size}; lower it, or set data.drop_last=false"
            )
        return count

    def start_at(self, position: int) -> None:
        """Make the first epoch of the next training loader begin in the middle.

        Args:
            position: In images of the whole job, as the state of a training loader has it. A stream of shards begins at
                the batch that this is nearest to.
        """
        self._position = position

    def train_dataloader(self) -> Loader:
        """This process's batches, shuffled and augmented, from the epoch on that the trainer is in.

        Images in memory are augmented by ``on_after_batch_transfer``; until then they are bytes.
        """
        position, self._position = self._position, 0
        return self._training(self._share(), epoch=self._epoch(), position=position)

    def augmented_images(self) -> Iterator[Tensor]:
        """Batches ``[N, C, H, W]`` of an epoch after the last, for statistics: all images, in this process alone."""
        for images, _, indices in self._training(Share(), epoch=self.epochs, position=0):
            yield images if self._in_batches is None else self._in_batches(images, indices, self.epochs)

    def val_dataloader(self) -> Loader:
        """This process's batches of the validation; together the processes see every image once."""
        return self._evaluation(self.splits.val, self._share())

    def test_dataloader(self) -> Loader:
        """Every test image once, in this process."""
        return self._evaluation(self.splits.test, Share())

    def test_images(self, count: int) -> Tensor:
        """At most ``count`` test images ``[N, C, H, W]``, evenly spaced because folders are sorted by class."""
        test = self.splits.test
        places = range(0, size_of(test), math.ceil(size_of(test) / count))
        if isinstance(test, Shards):
            samples = self._evaluation_stream(test, Share()).at(places)
        else:
            by_place = self._evaluation_samples(test)
            samples = (by_place[Draw(0, place, self._eval_size)] for place in places)
        return torch.stack([image for image, label, _ in samples if label != IGNORED])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment and normalise training images that are still bytes, on the device of the training."""
        trainer = self.trainer
        if self._in_batches is None or trainer is None or not trainer.training:
            return batch
        images, labels, indices = batch
        augmented = self._in_batches(images, indices, trainer.current_epoch)
        return trainer.precision_plugin.convert_input(augmented), labels, indices

    @property
    def _eval_size(self) -> Size:
        return self.preprocessing.input_size[1:]

    def _share(self) -> Share:
        trainer = self.trainer
        return Share() if trainer is None else Share(trainer.global_rank, trainer.world_size)

    def _epoch(self) -> int:
        """The epoch that training is in; Lightning asks for batches before it announces the epoch."""
        return 0 if self.trainer is None else cast("Any", self.trainer.fit_loop.epoch_progress.current).processed

    def _training(self, share: Share, *, epoch: int, position: int) -> Loader:
        train = self.splits.train
        if isinstance(train, Shards):
            return self._training_stream(train, share, epoch, position)
        batches = EpochBatches(
            size_of(train),
            batch_size=self.config.batch_size,
            share=share,
            seed=self.seed,
            drop_last=self.config.drop_last,
            size_at=self.size_at,
            epoch=epoch,
            position=position,
        )
        if self._in_batches is not None:
            return MemoryLoader(cast("ArrayImages", train), batches)
        samples = TrainingSamples(train, self._transforms, self.seed, self._report)
        return self._loader(samples, batch_sampler=batches)

    def _training_stream(self, shards: Shards, share: Share, epoch: int, position: int) -> Loader:
        batch = position // (self.config.batch_size * share.processes)
        stream = TrainingStream(
            shards=shards,
            batches=self.training_batches(share.processes),
            batch_size=self.config.batch_size,
            share=share,
            seed=self.seed,
            size_at=self.size_at,
            transform_at=self._transforms,
            report=self._report,
            clock=torch.tensor([epoch, batch]).share_memory_(),
        )
        return TrainingLoader(stream, workers=self.config.workers)

    def _evaluation(self, part: Part, share: Share) -> Loader:
        if isinstance(part, Shards):
            return EvaluationLoader(self._evaluation_stream(part, share), workers=self.config.workers)
        batches = EvaluationBatches(size_of(part), batch_size=self.config.batch_size, share=share, size=self._eval_size)
        if self._in_batches is not None:
            return MemoryLoader(
                cast("ArrayImages", part), batches, lambda images: normalised(images, self.preprocessing)
            )
        return self._loader(self._evaluation_samples(part), batch_sampler=batches)

    def _evaluation_samples(self, part: Part) -> EvaluationSamples:
        return EvaluationSamples(part, self.preprocessing.eval_transform(), self.config.in_chans, self._report)

    def _evaluation_stream(self, shards: Shards, share: Share) -> EvaluationStream:
        return EvaluationStream(
            shards=shards,
            batch_size=self.config.batch_size,
            share=share,
            transform=self.preprocessing.eval_transform(),
            channels=self.config.in_chans,
            size=self._eval_size,
            report=self._report,
        )

    def _loader(self, images: Any, **options: Any) -> Loader:
        return stateful_loader(images, workers=self.config.workers, **options)

    def _batch_augmentation(self) -> BatchAugmentation:
        config = self.config
        for part in (self.splits.train, self.splits.val, self.splits.test):
            _require_in_memory(config, part, {self._eval_size, self.size_at(0)})
        return BatchAugmentation.of(
            config.augment,
            preprocessing=self.preprocessing,
            images=size_of(self.splits.train),
            seed=self.seed,
        )


class _Transforms:
    """The augmentation for each size, made once per process."""

    def __init__(self, preprocessing: Preprocessing, augment: Mapping[str, Any]) -> None:
        self.preprocessing, self.augment = preprocessing, augment
        self._made: dict[Size, Transform] = {}

    def __call__(self, size: Size) -> Transform:
        if size not in self._made:
            self._made[size] = self.preprocessing.train_transform(self.augment, size)
        return self._made[size]


def _require_in_memory(config: DataConfig, part: Part, sizes: set[Size]) -> None:
    if not isinstance(part, ArrayImages):
        raise ConfigurationError(
            f"data.in_memory=true needs a dataset that is one array, such as cifar10, and data.name={config.name} is "
            "read image by image; set data.in_memory=false"
        )
    own = part.pixels.shape[1:3]
    if sizes != {own} or config.crop_pct != 1 or config.progressive:
        raise ConfigurationError(
            f"data.in_memory=true takes the images of {config.name} as they are, {own[0]}x{own[1]} pixels; for another "
            "data.image_size, data.eval_size, data.crop_pct or data.progressive set data.in_memory=false"
        )
