"""The three parts of a dataset."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image
from torch.utils.data import Dataset

from repblocks.errors import DataError
from repblocks.training.data.shards import Shards

Images = Dataset[tuple[Image.Image, int]]

Part = Images | Shards
"""Images that are read by their position, or one after the other."""


@dataclass(frozen=True)
class Splits:
    """The three parts of a dataset, as images; transforms come later."""

    train: Part
    val: Part
    test: Part
    class_names: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """Images per part."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: size_of(part) for name, part in parts.items()}


def size_of(part: Part) -> int:
    """Number of images; torch's datasets promise no length, ours have one."""
    return len(cast("Any", part))


def folder_of(name: str, root: str | None) -> Path:
    """The folder that ``data.root`` names.

    Raises:
        DataError: It names none.
    """
    if root is None:
        raise DataError(f"data={name} needs data.root=FOLDER, the folder that holds its files")
    return Path(root).expanduser()
