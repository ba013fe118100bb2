from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from repblocks.errors import ConfigurationError, DataError
from repblocks.training.data import IGNORED, DataConfig, ImageData
from repblocks.training.data.batch_augment import BatchAugmentation, random_table, whole_numbers
from repblocks.training.data.cifar import BINARY_VERSIONS
from repblocks.training.data.datasets import load_splits
from repblocks.training.data.transforms import Preprocessing

PREPROCESSING = Preprocessing(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def write_binary(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the binary version, with fewer images than the real ones have."""
    version = BINARY_VERSIONS[name]
    classes = 10 if name == "cifar10" else 100
    small = replace(version, train_images=classes * 10, test_images=classes * 2)
    monkeypatch.setitem(BINARY_VERSIONS, name, small)
    folder, rng = root / version.folder, np.random.default_rng(0)
    folder.mkdir(parents=True)
    for file, count in [*((file, small.train_images) for file in version.train), (version.test, small.test_images)]:
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8)[:, None] % classes
        coarse = labels // 5 if version.label_bytes == 2 else labels[:, :0]
        (folder / file).write_bytes(np.hstack([coarse, labels, pixels]).tobytes())
    (folder / version.names).write_text("".join(f"class_{i}\n" for i in range(classes)) + "\n")
    return folder


def load(name: str, root: Path) -> Any:
    return load_splits(name, root=str(root), download=False, in_chans=3)


class TestBinaryVersion:
    @pytest.mark.parametrize("name", ["cifar10", "cifar100"])
    def test_it_is_read_without_pickle(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = write_binary(tmp_path, name, monkeypatch)
        monkeypatch.setattr("pickle.load", None)
        splits = load(name, tmp_path)
        version, classes = BINARY_VERSIONS[name], len(splits.class_names)
        assert splits.class_names[3] == "class_3"
        files = len(version.train)
        assert splits.sizes() == {"train": 9 * files * classes, "val": files * classes, "test": 2 * classes}
        assert set(Counter(splits.val.labels).values()) == {files}
        record = (folder / version.test).read_bytes()[-3072:]
        image, label = splits.test[2 * classes - 1]
        assert label == classes - 1
        assert np.asarray(image).transpose(2, 0, 1).tobytes() == record

    @pytest.mark.parametrize("damage", ["truncated", "missing", "no names", "too few names"])
    def test_damaged_files_are_named(self, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = write_binary(tmp_path, "cifar10", monkeypatch)
        file = folder / ("batches.meta.txt" if "names" in damage else "data_batch_2.bin")
        match damage:
            case "truncated":
                file.write_bytes(file.read_bytes()[: -3073 * 5])
            case "too few names":
                file.write_text("cat\ndog\n")
            case _:
                file.unlink()
        named = folder if damage == "too few names" else file
        with pytest.raises(DataError, match=rf"{named}.*unpack the binary version again"):
            load("cifar10", tmp_path)


@pytest.fixture
def config(configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    write_binary(tmp_path, "cifar10", monkeypatch)
    values = configure("data=cifar10", f"data.root={tmp_path}", "data.batch_size=20", "data.augment.cutout=8")["data"]
    return DataConfig.of(values)


def slowly(augmentation: BatchAugmentation, image: Tensor, index: int, epoch: int) -> Tensor:
    """One image, augmented step by step as the words say."""
    numbers = random_table(augmentation.seed, epoch, augmentation.images)[index].tolist()
    padding, cutout = augmentation.padding, augmentation.cutout
    top, left = (int(number * (2 * padding + 1)) for number in numbers[:2])
    padded = torch.zeros(3, 32 + 2 * padding, 32 + 2 * padding)
    padded[:, padding : padding + 32, padding : padding + 32] = image
    cropped = padded[:, top : top + 32, left : left + 32]
    flipped = cropped.flip(2) if numbers[2] < augmentation.flip else cropped
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    out = (flipped / 255 - mean) / std
    row, column = (int(number * 32) - cutout // 2 for number in numbers[3:])
    out[:, max(row, 0) : max(row + cutout, 0), max(column, 0) : max(column + cutout, 0)] = 0
    return out


class TestBatchAugmentation:
    @pytest.mark.parametrize("cutout", [0, 8, 9])
    @pytest.mark.parametrize("padding", [0, 4])
    def test_it_is_that_of_each_image(self, padding: int, cutout: int) -> None:
        augment = BatchAugmentation(
            preprocessing=PREPROCESSING, images=300, seed=3, padding=padding, flip=0.5, cutout=cutout
        )
        images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
        indices = torch.randperm(300)[:50]
        expected = [slowly(augment, image, int(index), 2) for image, index in zip(images, indices, strict=True)]
        torch.testing.assert_close(augment(images, indices, 2), torch.stack(expected))

    def test_other_heights_than_widths_are_no_difficulty(self) -> None:
        augment = BatchAugmentation(preprocessing=PREPROCESSING, images=9, seed=0, padding=2)
        images = torch.full((9, 3, 8, 20), 255, dtype=torch.uint8)
        inside = (augment(images, torch.arange(9), 0) > 0).all(1).sum((1, 2))
        assert inside.min() >= 6 * 18
        assert inside.max() <= 8 * 20

    def test_numbers_close_to_one_are_not_rounded_up(self) -> None:
        largest = torch.tensor([1 - 2**-24])
        assert all(0 <= whole_numbers(largest, count).item() < count for count in range(1, 300))

    def test_epochs_and_seeds_differ(self) -> None:
        tables = [random_table(seed, epoch, 5) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
        assert len({tuple(table.flatten().tolist()) for table in tables}) == 3


class TestInMemory:
    def test_batches_are_those_of_the_other_path(self, config: DataConfig) -> None:
        in_memory, by_image = (ImageData(replace(config, in_memory=way, workers=0)) for way in (True, False))
        for ours, others in zip(in_memory.train_dataloader(), by_image.train_dataloader(), strict=True):
            assert torch.equal(ours[1], others[1])
            assert torch.equal(ours[2], others[2])
            assert ours[0].dtype == torch.uint8
        for ours, others in zip(in_memory.val_dataloader(), by_image.val_dataloader(), strict=True):
            torch.testing.assert_close(ours, others)

    def test_processes_evaluate_every_image_once(self, config: DataConfig) -> None:
        data = ImageData(replace(config, batch_size=7))
        assert torch.cat([labels for _, labels, _ in data.test_dataloader()]).tolist() == [*range(10)] * 2
        data.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        data.trainer.strategy.global_rank, data.trainer.strategy.world_size = 2, 3
        labels = torch.cat([labels for _, labels, _ in data.val_dataloader()])
        assert (len(labels), int((labels == IGNORED).sum())) == (17, 1)

    def test_training_augments_on_the_device_and_evaluation_does_not(self, config: DataConfig) -> None:
        data, seen = ImageData(config, seed=4), Watched()
        small = replace(config, batch_size=20)
        pl.Trainer(
            accelerator="cpu",
            precision="64-true",
            max_epochs=2,
            limit_train_batches=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            log_every_n_steps=1,
        ).fit(seen, datamodule=data)
        augment = BatchAugmentation.of(config.augment, preprocessing=data.preprocessing, images=450, seed=4)
        pixels = data.splits.train.bytes()
        assert len(seen.trained) == 4
        for step, (images, labels, indices) in enumerate(seen.trained):
            assert images.dtype == torch.float64
            torch.testing.assert_close(images.float(), augment(pixels[indices], indices, step // 2))
            assert labels.tolist() == [data.splits.train.labels[index] for index in indices]
        reference = next(iter(ImageData(replace(small, in_memory=False, workers=0)).val_dataloader()))
        torch.testing.assert_close(seen.validated[0][0].float(), reference[0])

    def test_images_for_statistics_are_augmented_and_not_shared_out(self, config: DataConfig) -> None:
        data = ImageData(config, seed=4, epochs=7)
        data.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        data.trainer.strategy.global_rank, data.trainer.strategy.world_size = 1, 2
        batches = list(data.augmented_images())
        assert [images.shape for images in batches] == [(20, 3, 32, 32)] * 22
        augment = BatchAugmentation.of(config.augment, preprocessing=data.preprocessing, images=450, seed=4)
        alone: Any = ImageData(config, seed=4).train_dataloader()
        alone.batch_sampler.set_epoch(7)
        images, _, indices = next(iter(alone))
        torch.testing.assert_close(batches[0], augment(images, indices, 7))

    def test_it_resumes_after_any_batch(self, config: DataConfig) -> None:
        whole: Any = ImageData(config).train_dataloader()
        expected = [indices.tolist() for _, _, indices in whole]
        interrupted: Any = ImageData(config).train_dataloader()
        batches = iter(interrupted)
        before = [next(batches)[2].tolist() for _ in range(9)]
        resumed: Any = ImageData(config).train_dataloader()
        resumed.load_state_dict(interrupted.state_dict())
        assert before + [indices.tolist() for _, _, indices in resumed] == expected
        assert len(resumed) == len(expected) == 22

    @pytest.mark.parametrize(
        ("key", "value"), [("degrees", 5), ("scale", [0.5, 1.0]), ("re_prob", 0.2), ("auto_augment", "rand-m9")]
    )
    def test_what_it_cannot_do_is_refused(self, config: DataConfig, key: str, value: Any) -> None:
        with pytest.raises(ConfigurationError, match=rf"data\.augment has {key}, .*data\.in_memory=false"):
            ImageData(replace(config, augment={**config.augment, key: value}))

    @pytest.mark.parametrize("change", [{"image_size": 64}, {"eval_size": 40}, {"crop_pct": 0.9}])
    def test_images_keep_their_size(self, config: DataConfig, change: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=r"32x32 pixels.*data\.in_memory=false"):
            ImageData(replace(config, **change))

    def test_files_are_not_in_memory(self, configure: Any, image_folder: Path) -> None:
        values = configure("data=imagefolder", f"data.root={image_folder}", "data.in_memory=true")["data"]
        with pytest.raises(ConfigurationError, match=r"imagefolder is read image by image; set data\.in_memory=false"):
            ImageData(DataConfig.of(values))


class Watched(pl.LightningModule):
    """Keeps the batches that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[Any] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        self.trained.append(batch)
        return self.weight * batch[0].mean()

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)
