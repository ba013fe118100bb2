"""Datasets by the names that timm's ``create_dataset`` gives them."""

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from PIL import Image
from timm.data.dataset import ImageDataset, IterableImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder, Places365

from repblocks.errors import ConfigurationError, DataError
from repblocks.images import Mode, read_image
from repblocks.names import known_name
from repblocks.training.data.reading import mode_for
from repblocks.training.data.shards import Shards
from repblocks.training.data.splits import Part, Splits, folder_of


@dataclass(frozen=True, kw_only=True)
class SplitNames:
    """What a dataset of timm calls its parts, and what its classes are.

    Attributes:
        train: Name of the training images.
        val: Name of the validation images.
        test: Name of the test images; None tests on the validation images.
        classes: How many, or a file with a name per line, where the dataset does not say.
    """

    train: str = "train"
    val: str = "validation"
    test: str | None = None
    classes: int | str | None = None


def is_of_timm(name: str) -> bool:
    """Whether timm is asked for the dataset."""
    return "/" in name or name == "tar"


def timm_splits(name: str, *, root: str | None, download: bool, in_chans: int, names: SplitNames) -> Splits:
    """Load a dataset of timm.

    Args:
        name: ``torch/NAME``, ``hfds/NAME``, ``wds/NAME`` or ``tar``.
        root: Folder of the files, or of the cache of ``hfds/``.
        download: Fetch missing files of ``torch/`` datasets into ``root``.
        in_chans: 1 or 3: images are read as grayscale or RGB.
        names: Of the splits and classes.

    Raises:
        ConfigurationError: An unknown kind of dataset, or a package that it needs is missing.
        DataError: Files or splits that are missing, or classes that are not known or not the same.
    """
    kind = known_name("data.name", name.partition("/")[0].lower() if "/" in name else name, _PACKAGES)
    _require_package(name, kind)
    options: dict[str, Any] = {"download": True} if download and kind == "torch" else {}
    place = None if root is None and kind == "hfds" else _place(name, root)
    mode = mode_for(in_chans)

    def part(split: str) -> Any:
        return _created(name, place, split, {"input_img_mode": mode, **options} if kind == "wds" else options)

    train, val = part(names.train), part(names.val)
    test = val if names.test is None else part(names.test)
    classes = _class_names(name, train, names.classes)
    for other in (val, test):
        _require_same_classes(name, classes, other)
    return Splits(*(_readable(each, name, mode) for each in (train, val, test)), class_names=classes)


def _place(name: str, root: str | None) -> str:
    """A folder, or what webdataset opens by a URL."""
    return root if root is not None and (":" in root) else str(folder_of(name, root))


def _require_package(name: str, kind: str) -> None:
    package = _PACKAGES[kind]
    if find_spec(package) is None:
        raise ConfigurationError(f"data.name={name} needs the package {package}: pip install {package}")


def _created(name: str, root: str | None, split: str, options: Mapping[str, Any]) -> Any:
    try:
        with _without_advice():
            return create_dataset("" if name == "tar" else name, root=root, split=split, search_split=True, **options)
    except Exception as error:  # datasets of a dozen libraries fail in their own ways, assertions among them
        raise DataError(
            f"the split {split!r} of data.name={name} cannot be loaded from {root} ({error or type(error).__name__}); "
            "check data.root, data.train_split, data.val_split and data.test_split"
        ) from error


@contextmanager
def _without_advice() -> Generator[None]:
    """Without timm's remark that shards have no file of facts: splits that say their size need none."""
    log = logging.getLogger("timm.data.readers.reader_wds")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _readable(dataset: Any, name: str, mode: Mode) -> Part:
    if isinstance(dataset, IterableImageDataset):
        return _shards(dataset.reader, name, mode)
    if isinstance(dataset, ImageDataset) and isinstance(dataset.reader, ReaderImageInTar):
        return TarImages(dataset.reader, mode)
    if isinstance(dataset, ImageDataset):
        return ReaderImages(dataset.reader, name, mode)
    if isinstance(dataset, DatasetFolder | Places365):
        dataset.loader = partial(read_image, mode=mode)  # ours says which file cannot be read
        return cast("Part", dataset)
    return TorchvisionImages(dataset, name, mode)


def _shards(reader: Any, name: str, mode: Mode) -> Shards:
    if not reader.num_samples:
        raise DataError(
            f"data.name={name} does not say how many images {', '.join(reader.split_info.filenames[:3])} ... hold; "
            "append it to the split, such as data.val_split='val-{000..049}.tar|50000'"
        )
    return Shards(
        files=tuple(f"{reader.root}/{file}" for file in reader.split_info.filenames),
        images=reader.num_samples,
        mode=mode,
        extensions=tuple(reader.input_key.split(";")),
        label_key=reader.split_info.alt_label,
        shuffled=reader.sample_shuffle_size,
        ahead=reader.sample_initial_size,
    )


class TarImages(Dataset[tuple[Image.Image, int]]):
    """Images in folders within tar files, which timm has indexed.

    They are read by their place in the file: an open tar file could not be shared with worker processes.
    """

    def __init__(self, reader: ReaderImageInTar, mode: Mode) -> None:
        self.reader = reader
        self.mode: Mode = mode

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        member, parent, child = self.reader.samples[index]
        file = Path(self.reader.root) / (parent or "")
        try:
            with file.open("rb") as opened:
                opened.seek(member.offset_data + (child.offset_data if child else 0))
                contents = opened.read(member.size)
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error}); repair or remove it") from error
        return read_image(BytesIO(contents), self.mode, str(file / member.name)), int(self.reader.targets[index])


class ReaderImages(Dataset[tuple[Image.Image, int]]):
    """Images of a reader of timm; unlike timm's dataset it does not replace one that cannot be read."""

    def __init__(self, reader: Any, name: str, mode: Mode) -> None:
        self.reader, self.name = reader, name
        self.mode: Mode = mode

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = f"image {index} of {self.name}"
        try:
            file, label = self.reader[index]
        except Exception as error:
            raise DataError(f"{name} cannot be read ({error}); repair or remove it") from error
        with file:
            return read_image(file, self.mode, name), int(label)


class TorchvisionImages(Dataset[tuple[Image.Image, int]]):
    """Images of one of torchvision's datasets."""

    def __init__(self, dataset: Any, name: str, mode: Mode) -> None:
        self.dataset, self.name, self.mode = dataset, name, mode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.dataset[index]
            return image.convert(self.mode), int(label)
        except Exception as error:
            raise DataError(f"image {index} of {self.name} cannot be read ({error}); repair or remove it") from error


def _class_names(name: str, dataset: Any, classes: int | str | None) -> tuple[str, ...]:
    if isinstance(classes, int):
        return tuple(str(label) for label in range(classes))
    if classes is not None:
        return _names_in_file(Path(classes).expanduser())
    names = _own_class_names(dataset)
    if names is None:
        raise DataError(
            f"data.name={name} does not name its classes; set data.classes to their number or to a file with a name "
            "per line"
        )
    return names


def _names_in_file(file: Path) -> tuple[str, ...]:
    try:
        return tuple(file.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.classes={file} cannot be read ({error}); needed is a text file, one name per line"
        ) from error


def _own_class_names(dataset: Any) -> tuple[str, ...] | None:
    return next((names for said in _SAYINGS if (names := said(dataset))), None)


def _of_torchvision(dataset: Any) -> tuple[str, ...]:
    return tuple(str(name) for name in getattr(dataset, "classes", ()))


def _of_reader(dataset: Any) -> tuple[str, ...]:
    reader = getattr(dataset, "reader", None)
    indices: Mapping[str, int] = (
        getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    )
    return tuple(sorted(indices, key=lambda name: indices[name]))


def _of_hugging_face(dataset: Any) -> tuple[str, ...]:
    reader = getattr(dataset, "reader", None)
    features = getattr(getattr(reader, "dataset", None), "features", None) or {}
    return tuple(getattr(features.get(getattr(reader, "label_key", "")), "names", ()))


_SAYINGS: tuple[Callable[[Any], tuple[str, ...]], ...] = (_of_torchvision, _of_reader, _of_hugging_face)


def _require_same_classes(name: str, classes: tuple[str, ...], part: Any) -> None:
    others = _own_class_names(part)
    if others is not None and len(others) != len(classes):
        different = sorted(set(classes) ^ set(others))
        raise DataError(
            f"the splits of data.name={name} have {len(classes)} and {len(others)} classes; they must be the same, but "
            f"these are in one only: {', '.join(different[:10])}"
        )


_PACKAGES: Mapping[str, str] = {"torch": "torchvision", "hfds": "datasets", "wds": "webdataset", "tar": "tarfile"}
"""What each kind of dataset is read with."""
