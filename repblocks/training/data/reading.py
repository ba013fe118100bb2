"""Gray or colour, and what to do about images that cannot be read."""

import sys
from typing import Any, Literal
from zlib import crc32

import torch

from repblocks.errors import DataError
from repblocks.images import Mode

BadImages = Literal["error", "skip"]

_FLAGS = 2**20


def mode_for(in_chans: int) -> Mode:
    """Gray or colour.

    Raises:
        DataError: Another number of channels than 1 or 3.
    """
    if in_chans not in (1, 3):
        raise DataError(f"data.in_chans={in_chans}, images are read in 1 (grayscale) or 3 channels; choose one of them")
    return "L" if in_chans == 1 else "RGB"


class LoadingError(DataError):
    """An error of a dataset that reads the same whether a worker process met it or this one.

    A loader raises a worker's errors again with the worker's traceback for a message; the message proper ends it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class Reporter:
    """What to do about bad images: stop, or leave them out and say so once, in this process or a worker of it.

    Args:
        policy: ``error`` or ``skip``, the value of ``data.bad_images``.
    """

    def __init__(self, policy: BadImages) -> None:
        self.policy = policy
        # Which messages were shown, by hash and not by content, so that processes can share it without a lock.
        self._shown: Any = torch.zeros(_FLAGS, dtype=torch.uint8).share_memory_() if policy == "skip" else None

    def __call__(self, error: DataError) -> None:
        """Report an image that is left out.

        Raises:
            DataError: Bad images are fatal: the same error, with the way out.
        """
        if self.policy == "error":
            raise LoadingError(f"{error}, or leave out what cannot be read with data.bad_images=skip") from error
        flag = crc32(str(error).encode()) % _FLAGS
        if not self._shown[flag]:
            self._shown[flag] = 1
            print(f"left out: {error}", file=sys.stderr, flush=True)
