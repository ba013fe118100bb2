"""Real images with labels, split into train, validation and test."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset, Subset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from repblocks.errors import DataError
from repblocks.names import known_name

Images = Dataset[tuple[Image.Image, int]]

SPLIT_SEED = 0
"""Splits are part of a dataset's definition: they do not follow the run's seed."""


@dataclass(frozen=True)
class Splits:
    """The three parts of a dataset, as images; transforms come later."""

    train: Images
    val: Images
    test: Images
    class_names: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """Images per part."""
        parts: dict[str, Any] = {"train": self.train, "val": self.val, "test": self.test}
        return {name: len(part) for name, part in parts.items()}


def load_splits(name: str, *, root: str | None, download: bool, in_chans: int) -> Splits:
    """Load the dataset called ``name``.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100`` or ``imagefolder``.
        root: Folder of the files, relative to the working directory; unused by ``digits``.
        download: Fetch missing CIFAR files into ``root``.
        in_chans: 1 or 3: images of a folder are read as grayscale or RGB.

    Raises:
        ConfigurationError: An unknown name.
        DataError: Missing, empty or inconsistent files.
    """
    load = _LOADERS[known_name("data.name", name, _LOADERS)]
    return load(root=root, download=download, in_chans=in_chans)


def _digits(*, in_chans: int, **_: Any) -> Splits:
    _require_channels("digits", in_chans, 1)
    digits = cast("Any", load_digits())
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = [int(label) for label in digits.target]
    images = cast("Images", [(Image.fromarray(image), label) for image, label in zip(pixels, labels, strict=True)])
    rest, test = _stratified(labels, 0.2)
    train, val = _stratified([labels[i] for i in rest], 0.125)
    return Splits(
        train=Subset(images, [rest[i] for i in train]),
        val=Subset(images, [rest[i] for i in val]),
        test=Subset(images, test),
        class_names=tuple(str(digit) for digit in range(10)),
    )


def _stratified(labels: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
    """Split indices so that ``fraction`` of every class is in the second part, the same in every run."""
    indices = list(range(len(labels)))
    parts: Any = train_test_split(indices, test_size=fraction, stratify=list(labels), random_state=SPLIT_SEED)
    return parts[0], parts[1]


def _cifar(dataset: type[CIFAR10], *, root: str | None, download: bool, in_chans: int) -> Splits:
    name = dataset.__name__.lower()
    _require_channels(name, in_chans, 3)
    folder = _root(name, root)
    try:
        train, test = (dataset(folder, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError, EOFError) as error:
        raise DataError(
            f"{name} was not found complete in {folder.absolute()} ({error}); fetch it with data.download=true, "
            f"or set data.root to the folder that holds {dataset.base_folder}"
        ) from error
    rest, val = _stratified(train.targets, 0.1)
    return Splits(Subset(train, rest), Subset(train, val), cast("Images", test), tuple(train.classes))


def _image_folder(*, root: str | None, in_chans: int, **_: Any) -> Splits:
    folder = _root("imagefolder", root)
    if in_chans not in (1, 3):
        raise DataError(f"data.in_chans={in_chans}, images are read in 1 (grayscale) or 3 channels; choose one of them")
    read = partial(_read_image, mode="L" if in_chans == 1 else "RGB")
    train, val = (_part_of_folder(folder / part, read) for part in ("train", "val"))
    test = _part_of_folder(folder / "test", read) if (folder / "test").is_dir() else val
    for part in (val, test):
        _require_same_classes(train, part)
    parts = cast("list[Images]", [train, val, test])
    return Splits(*parts, class_names=tuple(train.classes))


def _part_of_folder(folder: Path, read: Callable[[str], Image.Image]) -> ImageFolder:
    try:
        return ImageFolder(folder, loader=read)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder.absolute()} is missing or holds no images; needed are data.root/train/CLASS/*.png (or jpg, ...), "
            f"data.root/val/CLASS/*.png and, if you have one, data.root/test; set data.root ({error})"
        ) from error


def _read_image(path: str, mode: Literal["L", "RGB"]) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _in_eight_bits(path, image).convert(mode)
    except (OSError, SyntaxError) as error:  # a damaged PNG is a SyntaxError of Pillow
        raise DataError(f"{path} cannot be read as an image ({error}); repair or remove it") from error


def _in_eight_bits(path: str, image: Image.Image) -> Image.Image:
    """The same picture in a mode that Pillow converts without clipping values and without a warning."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"{path} has pixels of mode {image.mode!r}, whose range is not fixed; needed are 8 or 16 bits per value: "
            "scale it and save it as an 8-bit PNG"
        )
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _require_same_classes(train: ImageFolder, part: ImageFolder) -> None:
    different = sorted(set(train.classes) ^ set(part.classes))
    if different:
        raise DataError(
            f"{train.root} has {len(train.classes)} class folders and {part.root} has {len(part.classes)}; "
            f"they must be the same, but these are in one only: {', '.join(different[:10])}"
        )


def _root(name: str, root: str | None) -> Path:
    if root is None:
        raise DataError(f"data={name} needs data.root=FOLDER, the folder that holds its files")
    return Path(root).expanduser()


def _require_channels(name: str, in_chans: int, needed: int) -> None:
    if in_chans != needed:
        raise DataError(
            f"{name} has images of {needed} channel(s), data.in_chans={in_chans}; use it with a model for {needed} and "
            f"leave data.in_chans at {needed}"
        )


_LOADERS: Mapping[str, Callable[..., Splits]] = {
    "digits": _digits,
    "cifar10": partial(_cifar, CIFAR10),
    "cifar100": partial(_cifar, CIFAR100),
    "imagefolder": _image_folder,
}
