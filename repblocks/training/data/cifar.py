"""CIFAR-10 and CIFAR-100 from either version that their authors publish, as arrays in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import CIFAR10, CIFAR100

from repblocks.errors import DataError
from repblocks.training.data.memory import ArrayImages

_SHAPE = (3, 32, 32)


@dataclass(frozen=True, kw_only=True)
class BinaryVersion:
    """The files of a binary version; a record is the bytes of its labels, the class last, and of its pixels.

    Attributes:
        folder: Name of the folder that the archive unpacks to.
        names: File with a class name per line.
        train: Names of the files of training images.
        test: Name of the file of test images.
        label_bytes: Per record.
        train_images: Records per training file.
        test_images: Records of the test file.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """

    folder: str
    names: str
    train: tuple[str, ...]
    test: str
    label_bytes: int
    train_images: int
    test_images: int


BINARY_VERSIONS: Mapping[str, BinaryVersion] = {
    "cifar10": BinaryVersion(
        folder="cifar-10-batches-bin",
        names="batches.meta.txt",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test="test_batch.bin",
        label_bytes=1,
        train_images=10_000,
        test_images=10_000,
    ),
    "cifar100": BinaryVersion(
        folder="cifar-100-binary",
        names="fine_label_names.txt",
        train=("train.bin",),
        test="test.bin",
        label_bytes=2,
        train_images=50_000,
        test_images=10_000,
    ),
}

_PYTHON_VERSIONS: Mapping[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def load_cifar(name: str, root: Path, *, download: bool) -> tuple[ArrayImages, ArrayImages, tuple[str, ...]]:
    """Training images, test images and class names.

    The binary version is read if ``root`` holds its folder, with numpy alone; else the python version, which is
    pickled, by torchvision, which checks the md5 sums of its files first.

    Args:
        name: ``cifar10`` or ``cifar100``.
        root: The folder that holds the unpacked archive.
        download: Fetch the python version if neither is there.

    Raises:
        DataError: Missing, truncated or inconsistent files.
    """
    version = BINARY_VERSIONS[name]
    if (root / version.folder).is_dir():
        return _binary(root / version.folder, version)
    return _python(name, root, download=download)


def _binary(folder: Path, version: BinaryVersion) -> tuple[ArrayImages, ArrayImages, tuple[str, ...]]:
    names = tuple(_contents(folder / version.names).decode().split())
    train = [_records(folder / file, version.train_images, version.label_bytes) for file in version.train]
    test = _records(folder / version.test, version.test_images, version.label_bytes)
    _require_known_labels(folder, np.concatenate([*train, test]), version.label_bytes, len(names))
    return _images(np.concatenate(train), version), _images(test, version), names


def _contents(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file.absolute()} cannot be read ({error}); unpack the binary version again") from error


def _records(file: Path, count: int, label_bytes: int) -> NDArray[np.uint8]:
    """One row per image; an unreadable file and one of another size are refused."""
    contents = _contents(file)
    needed = count * (label_bytes + int(np.prod(_SHAPE)))
    if len(contents) != needed:
        raise DataError(
            f"{file.absolute()} has {len(contents):,} bytes, {count:,} images take {needed:,}: it is truncated or "
            "another file; unpack the binary version again"
        )
    return np.frombuffer(contents, np.uint8).reshape(count, -1)


def _require_known_labels(folder: Path, records: NDArray[np.uint8], label_bytes: int, classes: int) -> None:
    largest = int(records[:, label_bytes - 1].max())
    if largest >= classes:
        raise DataError(
            f"{folder.absolute()} has the label {largest}, but names {classes} classes; unpack the binary version again"
        )


def _images(records: NDArray[np.uint8], version: BinaryVersion) -> ArrayImages:
    planes = records[:, version.label_bytes :].reshape(-1, *_SHAPE)
    pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return ArrayImages(pixels, records[:, version.label_bytes - 1].tolist())


def _python(name: str, root: Path, *, download: bool) -> tuple[ArrayImages, ArrayImages, tuple[str, ...]]:
    dataset = _PYTHON_VERSIONS[name]
    try:
        parts: list[Any] = [dataset(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError, EOFError) as error:
        raise DataError(
            f"{name} was not found complete in {root.absolute()} ({error}); fetch it with data.download=true, "
            f"or set data.root to the folder that holds {BINARY_VERSIONS[name].folder} or {dataset.base_folder}"
        ) from error
    train, test = (ArrayImages(part.data, part.targets) for part in parts)
    return train, test, tuple(parts[0].classes)
