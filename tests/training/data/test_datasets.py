import hashlib
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from repblocks.errors import ConfigurationError, DataError
from repblocks.training.data import DataConfig, ImageData
from repblocks.training.data.datasets import Splits, load_splits


def load(name: str, root: Path | str | None = None, in_chans: int = 3) -> Splits:
    return load_splits(name, root=None if root is None else str(root), download=False, in_chans=in_chans)


def labels(part: Any) -> list[int]:
    return [part[i][1] for i in range(len(part))]


def pixels(part: Any) -> list[bytes]:
    return [part[i][0].tobytes() for i in range(len(part))]


class TestDigits:
    def test_every_image_is_in_exactly_one_part(self) -> None:
        splits = load("digits", in_chans=1)
        assert splits.sizes() == {"train": 1257, "val": 180, "test": 360}
        parts = [splits.train, splits.val, splits.test]
        assert len({image for part in parts for image in pixels(part)}) >= 1790  # a few digits are written twice alike

    def test_every_part_has_every_class_in_proportion(self) -> None:
        splits = load("digits", in_chans=1)
        for part, share in ((splits.train, 125.7), (splits.val, 18.0), (splits.test, 36.0)):
            counts = Counter(labels(part))
            assert sorted(counts) == list(range(10))
            assert all(abs(count - share) <= 0.06 * share + 1 for count in counts.values())

    def test_the_split_is_the_same_in_every_run(self) -> None:
        np.random.seed(1)  # noqa: NPY002 - the global state must not matter
        first = load("digits", in_chans=1)
        np.random.seed(2)  # noqa: NPY002
        assert pixels(first.test) == pixels(load("digits", in_chans=1).test)

    def test_they_are_gray(self) -> None:
        with pytest.raises(DataError, match="digits has images of 1 channel"):
            load("digits", in_chans=3)


def write_cifar(root: Path, dataset: type[CIFAR10], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files in CIFAR's format; only the checksums that torchvision expects are replaced."""
    rng = np.random.default_rng(0)
    classes, key = (10, "labels") if dataset is CIFAR10 else (100, "fine_labels")
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)

    def written(name: str, content: dict[str, Any]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data, usedforsecurity=False).hexdigest()]

    def batch(name: str, repeats: int) -> list[str]:
        images = rng.integers(0, 256, (classes * repeats, 3072), dtype=np.uint8)
        return written(name, {"data": images, key: [*range(classes)] * repeats})

    names = [f"class {i}" for i in range(classes)]
    meta = written(dataset.meta["filename"], {dataset.meta["key"]: names})
    monkeypatch.setattr(dataset, "train_list", [batch(name, 10) for name, _ in dataset.train_list])
    monkeypatch.setattr(dataset, "test_list", [batch(name, 2) for name, _ in dataset.test_list])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": meta[1]})


class TestCifar:
    @pytest.mark.parametrize("dataset", [CIFAR10, CIFAR100])
    def test_it_is_read_and_split(
        self, dataset: type[CIFAR10], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_cifar(tmp_path, dataset, monkeypatch)
        splits = load(dataset.__name__.lower(), tmp_path)
        classes = len(splits.class_names)
        files = len(dataset.train_list)
        assert splits.class_names[3] == "class 3"
        assert splits.sizes() == {"train": 9 * files * classes, "val": files * classes, "test": 2 * classes}
        assert set(Counter(labels(splits.val)).values()) == {files}

    def test_its_configuration_gives_batches(
        self, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_cifar(tmp_path, CIFAR10, monkeypatch)
        config = configure("data=cifar10", f"data.root={tmp_path}", "data.batch_size=7", "data.workers=0")["data"]
        data = ImageData(DataConfig(**config))
        for loader in (data.train_dataloader(), data.val_dataloader()):
            images, labels, _ = next(iter(loader))
            assert images.shape == (len(labels), 3, 32, 32) == (7, 3, 32, 32)

    def test_a_relative_root_starts_where_the_user_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_cifar(tmp_path / "here", CIFAR10, monkeypatch)
        monkeypatch.chdir(tmp_path)
        assert load("cifar10", "here").sizes()["test"] == 20

    def test_missing_files_say_where_and_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=rf"{tmp_path / 'none'}.*data\.download=true.*data\.root"):
            load("cifar10", tmp_path / "none")

    def test_a_truncated_file_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_cifar(tmp_path, CIFAR10, monkeypatch)
        file = tmp_path / CIFAR10.base_folder / "data_batch_2"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"not found complete"):
            load("cifar10", tmp_path)


class TestImageFolder:
    def test_folders_are_classes(self, image_folder: Path) -> None:
        splits = load("imagefolder", image_folder)
        assert splits.class_names == ("cat", "dog")
        assert splits.sizes() == {"train": 8, "val": 4, "test": 6}

    @pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
    def test_images_have_the_channels_asked_for(self, image_folder: Path, channels: int, mode: str) -> None:
        image, _ = load("imagefolder", image_folder, in_chans=channels).train[0]
        assert image.mode == mode

    def test_without_a_test_folder_validation_images_are_the_test(self, image_folder: Path) -> None:
        shutil.rmtree(image_folder / "test")
        splits = load("imagefolder", image_folder)
        assert pixels(splits.test) == pixels(splits.val)

    @pytest.mark.parametrize("damage", ["no root", "no val", "no classes", "empty class"])
    def test_a_missing_or_empty_folder_is_named(self, image_folder: Path, damage: str) -> None:
        folder = image_folder if damage == "no root" else image_folder / "val"
        shutil.rmtree(folder)
        if damage == "no classes":
            folder.mkdir()
        if damage == "empty class":
            for name in ("cat", "dog"):
                (folder / name).mkdir(parents=True)
        with pytest.raises(DataError, match=rf"{folder}.* is missing or holds no images.*set data\.root"):
            load("imagefolder", image_folder)

    def test_parts_must_have_the_same_classes(self, image_folder: Path) -> None:
        (image_folder / "val" / "dog").rename(image_folder / "val" / "wolf")
        with pytest.raises(DataError, match="in one only: dog, wolf"):
            load("imagefolder", image_folder)

    def test_an_unreadable_image_is_named(self, image_folder: Path) -> None:
        (image_folder / "train" / "cat" / "0.png").write_text("not a picture")
        splits = load("imagefolder", image_folder)
        with pytest.raises(DataError, match=r"cat/0\.png cannot be read"):
            splits.train[0]

    @pytest.mark.parametrize("channels", [1, 3])
    def test_sixteen_bits_per_pixel_keep_their_gray_levels(self, image_folder: Path, channels: int) -> None:
        levels = np.arange(256, dtype=np.uint16).reshape(8, 32) * 257
        Image.fromarray(levels).save(image_folder / "train" / "cat" / "0.png")
        image, _ = load("imagefolder", image_folder, in_chans=channels).train[0]
        gray = np.asarray(image).reshape(8, 32, channels)
        assert all(np.array_equal(gray[..., channel], levels // 257) for channel in range(channels))

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_pixels_without_a_fixed_range_are_refused(self, image_folder: Path, dtype: Any) -> None:
        Image.fromarray(np.ones((8, 8), dtype=dtype)).save(image_folder / "train" / "cat" / "00.tiff")
        with pytest.raises(DataError, match=r"cat/00\.tiff has pixels of mode .*save it as an 8-bit PNG"):
            load("imagefolder", image_folder).train[1]

    def test_a_palette_with_transparency_is_read_without_a_warning(self, image_folder: Path) -> None:
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([0, 0, 0, 10, 20, 30])
        palette.save(image_folder / "train" / "cat" / "0.png", transparency=bytes([255, 128]))
        image, _ = load("imagefolder", image_folder).train[0]
        assert image.getpixel((3, 3)) == (10, 20, 30)

    def test_other_channels_than_gray_and_colour_are_refused(self, image_folder: Path) -> None:
        with pytest.raises(DataError, match=r"data\.in_chans=2, images are read in 1 \(grayscale\) or 3"):
            load("imagefolder", image_folder, in_chans=2)

    def test_the_root_is_required(self) -> None:
        with pytest.raises(DataError, match=r"needs data\.root=FOLDER"):
            load("imagefolder")


def test_an_unknown_dataset_names_near_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.name=cifar1000 is unknown.*cifar100"):
        load("cifar1000")
