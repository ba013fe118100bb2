"""Images per second of CIFAR's fast path against the per-image pipeline: python scripts/bench_data.py.

Both read the same 32x32 images and give normalised batches after a padded random crop and a flip: here as one tensor
that is augmented in batches, there by torchvision's transforms, one image at a time, in a DataLoader with and
without worker processes. They take turns, the median round counts, and the ratios are what to quote.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor

from repblocks.training.data.batch_augment import BatchAugmentation
from repblocks.training.data.batches import EpochBatches, Share
from repblocks.training.data.memory import ArrayImages, MemoryLoader
from repblocks.training.data.transforms import Preprocessing

PREPROCESSING = Preprocessing(
    input_size=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), interpolation="bilinear"
)
NEEDED = 3.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="per epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each, of which the median counts")
    options = parser.parse_args(arguments)
    # The small operations of the fast path wait for a second thread longer than they gain by it where cores are busy.
    torch.set_num_threads(1)
    print("\n".join(compared(options.images, options.batch_size, options.rounds)))


def compared(count: int, batch_size: int, rounds: int) -> list[str]:
    """A line per pipeline, and how many times faster the fast path is."""
    rates = measured(pipelines(count, batch_size), count, rounds)
    fast = rates.pop("in memory")
    return [
        f"{count} images in batches of {batch_size}, one thread in the main process",
        f"  {'in memory':<24} {fast:9,.0f} images/s",
        *(f"  {name:<24} {rate:9,.0f} images/s, {fast / rate:.1f}x slower" for name, rate in rates.items()),
        f"  faster than the quickest of them {fast / max(rates.values()):.1f}x (needed: {NEEDED:g})",
    ]


def pipelines(count: int, batch_size: int) -> dict[str, Callable[[], Iterable[Tensor]]]:
    """Each gives the batches of one epoch, augmented."""
    rng = np.random.default_rng(0)
    images = ArrayImages(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), [0] * count)
    ours = MemoryLoader(images, _batches(count, batch_size))
    augment = BatchAugmentation(preprocessing=PREPROCESSING, images=count, seed=0, padding=4, flip=0.5)
    theirs = {workers: _by_image(images, batch_size, workers) for workers in (0, 2)}
    return {
        "in memory": lambda: (augment(batch, indices, 0) for batch, _, indices in ours),
        "torchvision, 0 workers": lambda: _images(theirs[0]),
        "torchvision, 2 workers": lambda: _images(theirs[2]),
    }


def measured(pipelines: dict[str, Callable[[], Iterable[Tensor]]], count: int, rounds: int) -> dict[str, float]:
    """Images per second, the median of rounds in which each has its turn; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(rounds + 1):
        for name, epoch in pipelines.items():
            begin = time.perf_counter()
            assert sum(len(batch) for batch in epoch()) == count
            seconds[name].append(time.perf_counter() - begin)
    return {name: count / median(times[1:]) for name, times in seconds.items()}


def _batches(count: int, batch_size: int) -> EpochBatches:
    return EpochBatches(
        count, batch_size=batch_size, share=Share(), seed=0, drop_last=False, size_at=lambda epoch: (32, 32)
    )


def _by_image(images: ArrayImages, batch_size: int, workers: int) -> Iterable[tuple[Tensor, Tensor]]:
    mean, std = PREPROCESSING.mean, PREPROCESSING.std
    transform = Compose([RandomCrop(32, 4), RandomHorizontalFlip(), ToTensor(), Normalize(mean, std)])
    return DataLoader(
        Transformed(images, transform),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def _images(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    return (images for images, _ in loader)


class Transformed(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's CIFAR10 gives them."""

    def __init__(self, images: ArrayImages, transform: Callable[[Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label


if __name__ == "__main__":
    main()
