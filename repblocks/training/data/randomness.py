"""Random numbers as a function of what they are drawn for."""

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch


def entropy(*key: int) -> int:
    """A number of 63 bits from whole numbers, such as the seed, the epoch and an image's position."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def seed_for(*key: int) -> None:
    """Make random numbers on the CPU of Python, numpy and torch depend on ``key`` only, from here on."""
    seed = entropy(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries of augmentation draw from the global generator
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' too


@contextmanager
def generators_kept() -> Generator[None]:
    """Afterwards the three generators go on from where they were.

    Augmentation without worker processes must not move the generators of the training. It takes as long as a small
    image's augmentation, so it is worth sharing between the images of a batch.
    """
    python, torchs = random.getstate(), torch.get_rng_state()
    numpys = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)  # noqa: NPY002
        torch.set_rng_state(torchs)
