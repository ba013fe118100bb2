"""From a file to an image, what happens to a file that is none, and images where no file is needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repblocks.errors import DataError

Mode = Literal["L", "RGB"]


def read_image(source: str | Path | IO[bytes], mode: Mode, name: str | None = None) -> Image.Image:
    """Decode an image of any format that Pillow knows.

    Args:
        source: A path, or an open file.
        mode: Gray or colour.
        name: What errors call it; needed for an open file.

    Raises:
        DataError: It is damaged, or its pixels have no fixed range.
    """
    name = str(source) if name is None else name
    try:
        with Image.open(source) as image:
            return in_mode(image, mode, name)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise DataError(f"{name} cannot be read as an image ({error}); repair or remove it") from error


def in_mode(image: Image.Image, mode: Mode, name: str) -> Image.Image:
    """The same picture in gray or colour, of 8 bits per value.

    Args:
        image: In any of Pillow's modes.
        mode: Gray or colour.
        name: What errors call it.

    Raises:
        DataError: Its pixels have no fixed range.
    """
    return _in_eight_bits(name, image).convert(mode)


def random_images(count: int, size: Sequence[int]) -> Tensor:
    """Normal numbers in the shape of images, ``[count, *size]``, the same in every call."""
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def _in_eight_bits(name: str, image: Image.Image) -> Image.Image:
    """The same picture in a mode that Pillow converts without clipping values and without a warning."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"{name} has pixels of mode {image.mode!r}, whose range is not fixed; needed are 8 or 16 bits per value: "
            "scale it and save it as an 8-bit PNG"
        )
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
