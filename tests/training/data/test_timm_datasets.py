import struct
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repblocks.errors import ConfigurationError, DataError
from repblocks.training.data import IGNORED, DataConfig, ImageData


def write_idx(file: Path, array: np.ndarray) -> None:
    """MNIST's format: a magic number with the number of dimensions, their sizes, the bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{array.ndim + 1}I", 0x800 + array.ndim, *array.shape)
    file.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 11)):
        folder = tmp_path / "MNIST" / "raw"
        write_idx(folder / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path


@pytest.fixture
def tars(image_folder: Path) -> Path:
    """The photos as root/train.tar and root/val.tar."""
    root = image_folder.parent / "tars"
    root.mkdir()
    for part in ("train", "val"):
        with tarfile.open(root / f"{part}.tar", "w") as file:
            file.add(image_folder / part, arcname=".")
    return root


def config_of(configure: Any, name: str, root: Path, *overrides: str) -> DataConfig:
    small = ("data.image_size=16", "data.batch_size=4", "data.workers=0")
    return DataConfig.of(configure("data=timm", f"data.name={name}", f"data.root={root}", *small, *overrides)["data"])


def tar_config(configure: Any, root: Path) -> DataConfig:
    return config_of(configure, "tar", root, "data.train_split=train.tar", "data.val_split=val.tar")


def everything(loader: Any) -> tuple[torch.Tensor, list[int]]:
    batches = list(loader)
    return torch.cat([images for images, _, _ in batches]), torch.cat([labels for _, labels, _ in batches]).tolist()


class TestTorchvision:
    def test_a_dataset_is_read_by_its_name(self, configure: Any, mnist: Path) -> None:
        data = ImageData(config_of(configure, "torch/mnist", mnist))
        assert data.splits.sizes() == {"train": 30, "val": 11, "test": 11}
        assert data.class_names[:2] == ("0 - zero", "1 - one")
        images, labels = everything(data.val_dataloader())
        assert images.shape == (11, 3, 16, 16)
        assert labels == [*range(10), 0]

    def test_images_have_the_channels_asked_for(self, configure: Any, mnist: Path) -> None:
        data = ImageData(config_of(configure, "torch/mnist", mnist, "data.in_chans=1"))
        assert next(iter(data.train_dataloader()))[0].shape == (4, 1, 16, 16)

    def test_a_folder_by_torchvision_names_a_bad_file(self, configure: Any, image_folder: Path) -> None:
        data = ImageData(config_of(configure, "torch/image_folder", image_folder))
        assert (data.class_names, data.splits.sizes()["val"]) == (("cat", "dog"), 4)
        (image_folder / "val" / "dog" / "1.png").write_bytes(b"")
        with pytest.raises(DataError, match=rf"{image_folder}/val/dog/1\.png cannot be read"):
            list(data.val_dataloader())

    def test_missing_files_are_named_with_what_to_set(self, configure: Any, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=rf"torch/mnist cannot be loaded from {tmp_path}/none.*check data\.root"):
            ImageData(config_of(configure, "torch/mnist", tmp_path / "none"))

    @pytest.mark.parametrize("name", ["torch/mnisst", "torch/"])
    def test_an_unknown_dataset_is_named(self, configure: Any, mnist: Path, name: str) -> None:
        with pytest.raises(DataError, match=rf"data\.name={name} cannot be loaded .*Unknown torchvision dataset"):
            ImageData(config_of(configure, name, mnist))


class TestTar:
    def test_folders_in_the_file_are_the_classes(self, configure: Any, tars: Path, image_folder: Path) -> None:
        by_tar = ImageData(tar_config(configure, tars))
        by_file = ImageData(config_of(configure, "imagefolder", image_folder))
        assert by_tar.class_names == ("cat", "dog")
        for ours, files in zip(everything(by_tar.val_dataloader()), everything(by_file.val_dataloader()), strict=True):
            torch.testing.assert_close(ours, files)

    def test_tar_files_in_the_file_are_the_classes_too(self, configure: Any, tars: Path, image_folder: Path) -> None:
        for label in ("cat", "dog"):
            with tarfile.open(tars / f"{label}.tar", "w") as file:
                for image in sorted((image_folder / "val" / label).iterdir()):
                    file.add(image, arcname=image.name)
        with tarfile.open(tars / "nested.tar", "w") as file:
            for label in ("cat", "dog"):
                file.add(tars / f"{label}.tar", arcname=f"{label}.tar")
        nested = ImageData(replace(tar_config(configure, tars), train_split="nested.tar", val_split="nested.tar"))
        assert nested.class_names == ("cat", "dog")
        images, labels = everything(nested.val_dataloader())
        assert labels == [0, 1, 0, 1]
        flat, _ = everything(ImageData(tar_config(configure, tars)).val_dataloader())
        torch.testing.assert_close(images, flat[[0, 2, 1, 3]])

    def test_worker_processes_do_not_share_an_open_file(self, configure: Any, tars: Path) -> None:
        data = ImageData(tar_config(configure, tars))
        images, _ = everything(data.val_dataloader())
        with_workers = ImageData(replace(data.config, workers=2, batch_size=1))
        with_workers.test_images(4)
        for _ in range(3):
            torch.testing.assert_close(everything(with_workers.val_dataloader())[0], images)

    def test_a_bad_member_is_named_or_left_out(
        self, configure: Any, tars: Path, image_folder: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        bad = image_folder / "val" / "dog" / "0.png"
        bad.write_bytes(b"no picture")
        with tarfile.open(tars / "val.tar", "w") as file:
            file.add(image_folder / "val", arcname=".")
        config = tar_config(configure, tars)
        with pytest.raises(DataError, match=r"val\.tar/(\./)?dog/0\.png cannot be read"):
            list(ImageData(config).val_dataloader())
        _, labels = everything(ImageData(replace(config, bad_images="skip")).val_dataloader())
        assert labels == [0, 0, IGNORED, 1]
        assert capfd.readouterr().err.count("dog/0.png cannot be read") == 1

    def test_splits_must_have_the_same_classes(self, configure: Any, tars: Path, image_folder: Path) -> None:
        with tarfile.open(tars / "val.tar", "w") as file:
            file.add(image_folder / "val" / "dog", arcname="dog")
        with pytest.raises(DataError, match=r"have 2 and 1 classes.*in one only: cat"):
            ImageData(tar_config(configure, tars))

    def test_a_file_that_is_no_tar_is_named(self, configure: Any, tars: Path) -> None:
        (tars / "val.tar").write_bytes(b"no tar" * 1000)
        with pytest.raises(DataError, match=r"the split 'val\.tar' of data\.name=tar cannot be loaded"):
            ImageData(tar_config(configure, tars))


def test_a_missing_package_is_named(configure: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"hfds/cats needs the package datasets: pip install datasets"):
        ImageData(config_of(configure, "hfds/cats", tmp_path))


def test_an_unknown_kind_of_dataset_names_near_ones(configure: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.name=torhc is unknown; did you mean one of: torch"):
        ImageData(config_of(configure, "torhc/mnist", tmp_path))


def test_the_root_is_required(configure: Any) -> None:
    with pytest.raises(DataError, match=r"needs data\.root=FOLDER"):
        ImageData(replace(config_of(configure, "torch/mnist", Path("none")), root=None))


def test_a_folder_goes_by_both_names(configure: Any, image_folder: Path) -> None:
    first, second = (ImageData(config_of(configure, name, image_folder)) for name in ("folder", "imagefolder"))
    assert first.splits.sizes() == second.splits.sizes() == {"train": 8, "val": 4, "test": 6}
