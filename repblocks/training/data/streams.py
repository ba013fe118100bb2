"""Batches from tar shards, for any number of processes and workers."""

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from itertools import count, islice
from random import Random
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from repblocks.errors import DataError
from repblocks.training.data.batches import IGNORED, Batch, Share, Size
from repblocks.training.data.loaders import stateful_loader
from repblocks.training.data.randomness import entropy, generators_kept, seed_for
from repblocks.training.data.reading import LoadingError, Reporter
from repblocks.training.data.samples import Sample, blank
from repblocks.training.data.shards import Member, Shards
from repblocks.training.data.transforms import Transform


@dataclass(frozen=True)
class Reach:
    """Which of the streams of a job this one is: each worker of each process reads its own."""

    share: Share
    worker: int
    workers: int

    @classmethod
    def here(cls, share: Share) -> "Reach":
        """That of the worker that asks, or of a process without workers."""
        info = get_worker_info()
        return cls(share, 0, 1) if info is None else cls(share, info.id, info.num_workers)

    @property
    def streams(self) -> int:
        """Of the whole job."""
        return self.share.processes * self.workers

    @property
    def number(self) -> int:
        """Of this stream, counted from 0."""
        return self.share.rank * self.workers + self.worker

    def batches(self, total: int) -> int:
        """How many of the first ``total`` batches of a process are this worker's; they take turns."""
        return len(range(self.worker, total, self.workers))


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingStream(IterableDataset[Sample]):
    """Shuffled and augmented images, as many as fill a number of batches.

    Each epoch shuffles the shards, deals them out to the streams of the job, and shuffles what a stream reads in a
    buffer. A stream whose shards end before the epoch does is dealt others, so an epoch has every image once only
    where shards and batches divide evenly. Everything random is drawn from the seed, the epoch and the stream: the
    same processes and workers see the same images, in the same order.

    Attributes:
        shards: What is read.
        batches: Per process and epoch.
        batch_size: Of one process.
        share: Which process this is.
        seed: The run's.
        size_at: The images' size in an epoch.
        transform_at: Augmentation and preprocessing for a size.
        report: Called for what cannot be read; if it returns, the next member takes its place.
        clock: The epoch and the batch that it begins at, in memory that workers share.
    """

    shards: Shards
    batches: int
    batch_size: int
    share: Share
    seed: int
    size_at: Callable[[int], Size]
    transform_at: Callable[[Size], Transform]
    report: Reporter
    clock: torch.Tensor

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> "_Drawing":
        return _Drawing(self, Reach.here(self.share))

    def members(self, reach: Reach, epoch: int) -> Iterator[Member]:
        """What a stream reads in an epoch, without end.

        Raises:
            DataError: There are more streams than shards, or nothing can be read.
        """
        files = self.shards.files
        if reach.streams > len(files):
            raise LoadingError(
                f"{len(files)} shard(s) cannot be shared by {reach.streams} streams ({reach.share.processes} "
                f"process(es) with {reach.workers} worker(s) each); lower data.workers, or write more, smaller shards"
            )
        for lap in count():
            order = np.random.default_rng((self.seed, epoch, lap)).permutation(len(files))
            mine = [files[i] for i in order[reach.number :: reach.streams]]
            rng = Random(entropy(self.seed, epoch, lap, reach.number))
            members = self.shards.members(mine, self.report)
            found = False
            for member in shuffle(self.shards.shuffled, initial=self.shards.ahead, rng=rng)(members):
                found = True
                yield member
            if not found:
                raise LoadingError(f"{', '.join(mine[:3])} hold no images; check data.root and data.train_split")


class _Drawing:
    """One epoch of a stream; it stops and resumes at any image, without decoding those before it."""

    def __init__(self, stream: TrainingStream, reach: Reach) -> None:
        self.stream, self.reach = stream, reach
        self.read = self.given = 0
        self.epoch, self._members = -1, iter(())

    def __iter__(self) -> "_Drawing":
        return self

    def __next__(self) -> Sample:
        # Loaders make iterators before the epoch is announced, so the clock is read with the first image.
        if self.epoch < 0:
            self._open(*self.stream.clock.tolist())
        if self.given >= self.reach.batches(self.stream.batches) * self.stream.batch_size:
            raise StopIteration
        image, label = self._readable()
        self.given += 1
        stream, reach, number = self.stream, self.reach, self.read
        with generators_kept():
            seed_for(stream.seed, self.epoch, reach.share.rank, reach.worker, number)
            sample = stream.transform_at(stream.size_at(self.epoch))(image)
        return sample, label, number * reach.streams + reach.number

    def state_dict(self) -> dict[str, int]:
        """The epoch and the members that were read and given out."""
        return {"epoch": self.epoch, "read": self.read, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where ``state`` was taken; the members before it are read but not decoded."""
        if state["epoch"] >= 0:
            self.epoch, self.read, self.given = state["epoch"], state["read"], state["given"]
            self._members = islice(self.stream.members(self.reach, self.epoch), self.read, None)

    def _open(self, epoch: int, batch: int) -> None:
        skipped = self.reach.batches(batch) * self.stream.batch_size
        self.load_state_dict({"epoch": epoch, "read": skipped, "given": skipped})

    def _readable(self) -> tuple[Any, int]:
        for member in islice(self._members, len(self.stream.shards)):
            self.read += 1
            try:
                return self.stream.shards.decode(member)
            except DataError as error:
                self.stream.report(error)
        raise LoadingError("none of the training images can be read; check data.root and data.train_split")


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationStream(IterableDataset[Sample]):
    """Images in order; together the processes see each once, and each process gets equally many entries.

    Every worker of every process reads all shards but decodes its own images only, so it does not matter how many
    images a shard holds.

    Attributes:
        shards: What is read.
        batch_size: Of one process.
        share: Which process this is.
        transform: Preprocessing.
        channels: Of the images.
        size: Of the images.
        report: Called for what cannot be read; if it returns, the image is left out.
    """

    shards: Shards
    batch_size: int
    share: Share
    transform: Transform
    channels: int
    size: Size
    report: Reporter

    def __len__(self) -> int:
        return math.ceil(len(self.shards) / self.share.processes)

    def __iter__(self) -> Iterator[Sample]:
        reach, found = Reach.here(self.share), 0
        for member in self.shards.members(self.shards.files, self.report):
            if found < len(self.shards) and self._is_mine(found, reach):
                yield self._sample(member, found)
            found += 1
        self._require_all(found)
        for place in range(found, len(self) * self.share.processes):
            if self._is_mine(place, reach):
                yield self._left_out(place)

    def at(self, places: Container[int]) -> Iterator[Sample]:
        """The images at some places, in this process."""
        members = self.shards.members(self.shards.files, self.report)
        return (self._sample(member, place) for place, member in enumerate(members) if place in places)

    def _is_mine(self, place: int, reach: Reach) -> bool:
        turn, rank = divmod(place, self.share.processes)
        return rank == self.share.rank and turn // self.batch_size % reach.workers == reach.worker

    def _sample(self, member: Member, place: int) -> Sample:
        try:
            image, label = self.shards.decode(member)
        except DataError as error:
            self.report(error)
            return self._left_out(place)
        return self.transform(image), label, place

    def _left_out(self, place: int) -> Sample:
        return blank(self.channels, self.size), IGNORED, place % len(self.shards)

    def _require_all(self, found: int) -> None:
        if found > len(self.shards) or (found < len(self.shards) and self.report.policy == "error"):
            raise LoadingError(
                f"{', '.join(self.shards.files[:3])} hold {found} images, not {len(self.shards)} as the name of the "
                "split or _info.json says; correct it"
            )


class _Batches:
    """Batches of a stream, without its dataset, whose length Lightning would warn of: ours are exact."""

    def __init__(self, stream: "TrainingStream | EvaluationStream", *, workers: int) -> None:
        self.loader = stateful_loader(stream, workers=workers, batch_size=stream.batch_size)

    @property
    def _iterator(self) -> Any:
        """Lightning ends workers by taking this away."""
        return cast("Any", self.loader)._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        cast("Any", self.loader)._iterator = iterator


class EvaluationLoader(_Batches):
    """Batches of an evaluation stream.

    Args:
        stream: What is batched.
        workers: Processes that read.
    """

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


class TrainingLoader(_Batches):
    """Batches of a training stream; Lightning announces epochs to it as to a sampler.

    Args:
        stream: What is batched.
        workers: Processes that read.
    """

    def __init__(self, stream: TrainingStream, *, workers: int) -> None:
        super().__init__(stream, workers=workers)
        self.stream = stream
        self.batches = self._resumed = 0

    @property
    def sampler(self) -> "TrainingLoader":
        """Itself, which knows what an epoch is."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the next one, from its beginning."""
        if epoch != int(self.stream.clock[0]):
            self.stream.clock[:] = torch.tensor([epoch, 0])

    def __len__(self) -> int:
        return self.stream.batches

    def __iter__(self) -> Iterator[Batch]:
        self.batches, self._resumed = self._resumed or int(self.stream.clock[1]), 0
        # Workers start at once, as they do for the loaders of torch.
        return self._counted(iter(self.loader))

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the batches given out, and the state of the workers."""
        return {"epoch": int(self.stream.clock[0]), "batches": self.batches, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration begin where ``state`` was taken; the end of an epoch is the start of the next."""
        ended = state["batches"] >= len(self)
        self.set_epoch(state["epoch"] + ended)
        self.loader.load_state_dict({} if ended else state["loader"])
        self.batches = self._resumed = 0 if ended else state["batches"]
