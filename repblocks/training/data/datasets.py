"""Real images with labels, split into train, validation and test."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import ImageFolder

from repblocks.errors import DataError
from repblocks.images import read_image
from repblocks.names import known_name
from repblocks.training.data.cifar import load_cifar
from repblocks.training.data.memory import ArrayImages
from repblocks.training.data.reading import mode_for
from repblocks.training.data.splits import Images, Splits, folder_of
from repblocks.training.data.timm_datasets import SplitNames, is_of_timm, timm_splits

SPLIT_SEED = 0
"""Splits are part of a dataset's definition: they do not follow the run's seed."""


def load_splits(
    name: str, *, root: str | None, download: bool, in_chans: int, names: SplitNames | None = None
) -> Splits:
    """Load the dataset called ``name``.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100``, ``imagefolder`` (or ``folder``), or one that timm's
            ``create_dataset`` knows: ``torch/NAME``, ``hfds/NAME``, ``wds/NAME`` or ``tar``.
        root: Folder of the files, relative to the working directory; unused by ``digits``.
        download: Fetch missing files into ``root``, where the dataset can.
        in_chans: 1 or 3: images of files are read as grayscale or RGB.
        names: Names of the splits and classes of timm's datasets.

    Raises:
        ConfigurationError: An unknown name, or a package that it needs is missing.
        DataError: Missing, empty or inconsistent files.
    """
    names = SplitNames() if names is None else names
    if is_of_timm(name):
        return timm_splits(name, root=root, download=download, in_chans=in_chans, names=names)
    load = _LOADERS[known_name("data.name", name, _LOADERS)]
    return load(root=root, download=download, in_chans=in_chans)


def _digits(*, in_chans: int, **_: Any) -> Splits:
    _require_channels("digits", in_chans, 1)
    digits = cast("Any", load_digits())
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = ArrayImages(pixels, [int(label) for label in digits.target])
    rest, test = _stratified(images, 0.2)
    train, val = _stratified(rest, 0.125)
    return Splits(train, val, test, tuple(str(digit) for digit in range(10)))


def _stratified(images: ArrayImages, fraction: float) -> tuple[ArrayImages, ArrayImages]:
    """Split so that ``fraction`` of every class is in the second part, the same in every run."""
    indices = list(range(len(images)))
    parts: Any = train_test_split(indices, test_size=fraction, stratify=images.labels, random_state=SPLIT_SEED)
    return images.part(parts[0]), images.part(parts[1])


def _cifar(name: str, *, root: str | None, download: bool, in_chans: int) -> Splits:
    _require_channels(name, in_chans, 3)
    images, test, class_names = load_cifar(name, folder_of(name, root), download=download)
    return Splits(*_stratified(images, 0.1), test, class_names)


def _image_folder(*, root: str | None, in_chans: int, **_: Any) -> Splits:
    folder = folder_of("imagefolder", root)
    read = partial(read_image, mode=mode_for(in_chans))
    train, val = (_part_of_folder(folder / part, read) for part in ("train", "val"))
    test = _part_of_folder(folder / "test", read) if (folder / "test").is_dir() else val
    for part in (val, test):
        _require_same_classes(train, part)
    parts = cast("list[Images]", [train, val, test])
    return Splits(*parts, class_names=tuple(train.classes))


def _part_of_folder(folder: Path, read: Callable[[str], Any]) -> ImageFolder:
    try:
        return ImageFolder(folder, loader=read)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder.absolute()} is missing or holds no images; needed are data.root/train/CLASS/*.png (or jpg, ...), "
            f"data.root/val/CLASS/*.png and, if you have one, data.root/test; set data.root ({error})"
        ) from error


def _require_same_classes(train: ImageFolder, part: ImageFolder) -> None:
    different = sorted(set(train.classes) ^ set(part.classes))
    if different:
        raise DataError(
            f"{train.root} has {len(train.classes)} class folders and {part.root} has {len(part.classes)}; "
            f"they must be the same, but these are in one only: {', '.join(different[:10])}"
        )


def _require_channels(name: str, in_chans: int, needed: int) -> None:
    if in_chans != needed:
        raise DataError(
            f"{name} has images of {needed} channel(s), data.in_chans={in_chans}; use it with a model for {needed} and "
            f"leave data.in_chans at {needed}"
        )


_LOADERS: Mapping[str, Callable[..., Splits]] = {
    "digits": _digits,
    "cifar10": partial(_cifar, "cifar10"),
    "cifar100": partial(_cifar, "cifar100"),
    "imagefolder": _image_folder,
    "folder": _image_folder,
}
