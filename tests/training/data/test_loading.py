import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from training.data.interrupted import (
    Always,
    KillAfter,
    Killed,
    Recorder,
    assert_same,
    end_workers,
    through_a_file,
    trainer,
)

from repblocks.errors import ConfigurationError, DataError
from repblocks.training.data import IGNORED, DataConfig, ImageData
from repblocks.training.evaluation import accuracy


@pytest.fixture
def config(configure: Any, image_folder: Path) -> DataConfig:
    overrides = (f"data.root={image_folder}", "data=imagefolder", "data.image_size=16", "data.batch_size=2")
    return DataConfig.of(configure(*overrides, "data.workers=0")["data"])


def images_of(batches: Any) -> dict[int, Tensor]:
    """Each image by its position."""
    return {int(index): image for images, _, indices in batches for image, index in zip(images, indices, strict=True)}


class TestBatches:
    def test_positions_say_which_images_they_are(self, config: DataConfig) -> None:
        data = ImageData(config)
        for _, labels, indices in data.train_dataloader():
            assert labels.dtype == indices.dtype == torch.int64
            assert labels.tolist() == [data.splits.train[index][1] for index in indices.tolist()]
        assert torch.cat([indices for _, _, indices in data.val_dataloader()]).tolist() == [0, 1, 2, 3]

    def test_processes_together_train_on_the_images_of_one(self, config: DataConfig) -> None:
        whole = list(ImageData(replace(config, batch_size=4)).train_dataloader())
        parts = [list(Alone(config, rank, 2).train_dataloader()) for rank in (0, 1)]
        joined = [tuple(torch.cat(pair) for pair in zip(*slices, strict=True)) for slices in zip(*parts, strict=True)]
        assert_same(joined, whole)

    def test_processes_together_validate_on_every_image_once(self, config: DataConfig, image_folder: Path) -> None:
        (image_folder / "val" / "dog" / "0.png").unlink()
        parts = [list(Alone(config, rank, 2).val_dataloader()) for rank in (0, 1)]
        assert [len(part) for part in parts] == [1, 1]
        counted = [int(i) for part in parts for _, labels, indices in part for i in indices[labels != IGNORED]]
        assert sorted(counted) == [0, 1, 2]

    def test_accuracy_leaves_out_what_only_fills_up(self, config: DataConfig, image_folder: Path) -> None:
        (image_folder / "val" / "dog" / "0.png").unlink()
        loader = Alone(config, 1, 2).val_dataloader()
        assert accuracy(Always(0), loader, classes=2, what="") == 1.0
        assert accuracy(Always(1), loader, classes=2, what="") == 0.0


class Alone(ImageData):
    """The data of one process of several, without the others."""

    def __init__(self, config: DataConfig, rank: int, processes: int) -> None:
        super().__init__(config)
        self.trainer: Any = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        self.trainer.strategy.global_rank, self.trainer.strategy.world_size = rank, processes


class TestRandomness:
    def test_an_image_looks_the_same_whoever_loads_it(self, config: DataConfig) -> None:
        alone = images_of(ImageData(config).train_dataloader())
        for other in (replace(config, workers=2), replace(config, batch_size=4)):
            found = images_of(ImageData(other).train_dataloader())
            assert all(torch.equal(found[index], alone[index]) for index in alone)

    def test_it_changes_with_the_epoch_and_the_seed(self, config: DataConfig) -> None:
        loader: Any = ImageData(config).train_dataloader()
        first, other = images_of(loader), images_of(ImageData(config, seed=1).train_dataloader())
        loader.batch_sampler.set_epoch(1)
        second = images_of(loader)
        for index in first:
            assert not torch.equal(first[index], second[index])
            assert not torch.equal(first[index], other[index])

    @pytest.mark.parametrize("workers", [0, 1])
    def test_loading_leaves_the_generators_of_the_training_alone(self, config: DataConfig, workers: int) -> None:
        data = ImageData(replace(config, workers=workers))
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002 - what augmentation draws from
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        for loader in (data.train_dataloader(), data.val_dataloader()):
            list(loader)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]

    def test_images_for_statistics_are_of_an_epoch_after_the_last(self, config: DataConfig) -> None:
        grown = replace(config, image_size=64, progressive={"start": 32, "until": 1.0})
        batches = list(ImageData(grown, epochs=2).augmented_images())
        assert [images.shape for images in batches] == [(2, 3, 64, 64)] * 4

    def test_training_images_grow_while_evaluation_keeps_its_size(self, config: DataConfig) -> None:
        grown = replace(config, image_size=64, eval_size=[80, 96], progressive={"start": 32, "until": 0.5})
        data = ImageData(grown, epochs=4)
        loader: Any = data.train_dataloader()
        sides = []
        for epoch in range(4):
            loader.batch_sampler.set_epoch(epoch)
            sides.append({images.shape[2:] for images, _, _ in loader})
        assert sides == [{(32, 32)}, {(32, 32)}, {(64, 64)}, {(64, 64)}]
        assert data.test_images(1).shape == (1, 3, 80, 96)
        assert data.preprocessing.input_size == (3, 80, 96)


class TestResume:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("given_out", [0, 1, 3, 4])
    def test_a_loader_resumes_after_any_batch(self, config: DataConfig, workers: int, given_out: int) -> None:
        data = ImageData(replace(config, workers=workers))
        whole: Any = data.train_dataloader()
        whole.batch_sampler.set_epoch(2)
        expected = list(whole)
        whole.batch_sampler.set_epoch(3)
        expected += list(whole)
        interrupted: Any = data.train_dataloader()
        interrupted.batch_sampler.set_epoch(2)
        before = list(islice(iter(interrupted), given_out))
        state = through_a_file(interrupted.state_dict())
        resumed: Any = data.train_dataloader()
        resumed.load_state_dict(state)
        rest = list(resumed)
        if given_out < 4:
            resumed.batch_sampler.set_epoch(3)
            rest += list(resumed)
        assert_same(before + rest, expected)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_loader_starts_where_it_is_told_to(self, config: DataConfig, workers: int) -> None:
        data = ImageData(replace(config, workers=workers))
        whole = list(data.train_dataloader())
        data.start_at(4)
        assert_same(list(data.train_dataloader()), whole[2:])
        assert_same(list(data.train_dataloader()), whole)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_lightning_announces_every_epoch(self, config: DataConfig, workers: int) -> None:
        data = ImageData(replace(config, workers=workers))
        seen = Recorder()
        trainer(max_epochs=3).fit(seen, datamodule=data)
        loader: Any = data.train_dataloader()
        expected = []
        for epoch in range(3):
            loader.batch_sampler.set_epoch(epoch)
            expected += list(loader)
        assert_same(seen.batches, expected)

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize(
        ("moment", "steps"),
        [
            ("on_train_batch_end", 6),
            ("on_train_batch_end", 8),
            ("on_validation_end", 8),
            ("on_train_epoch_end", 8),
        ],
    )
    def test_lightning_resumes_within_and_between_epochs(
        self, config: DataConfig, tmp_path: Path, workers: int, moment: str, steps: int
    ) -> None:
        whole, before, after = Recorder(), Recorder(), Recorder()
        trainer(max_epochs=3).fit(whole, datamodule=ImageData(replace(config, workers=workers)))
        interrupted = trainer(max_epochs=3, callbacks=[KillAfter(moment, steps, tmp_path / "state.ckpt")])
        with pytest.raises(Killed):
            interrupted.fit(before, datamodule=ImageData(replace(config, workers=workers)))
        resumed = trainer(max_epochs=3)
        resumed.fit(after, datamodule=ImageData(replace(config, workers=workers)), ckpt_path=tmp_path / "state.ckpt")
        assert_same(before.batches + after.batches, whole.batches)


class TestBadImages:
    def test_a_bad_image_is_fatal_by_default_and_named(self, config: DataConfig, image_folder: Path) -> None:
        (image_folder / "train" / "cat" / "1.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"cat/1\.png cannot be read.*data\.bad_images=skip"):
            list(ImageData(config).train_dataloader())

    def test_a_worker_names_it_too(self, config: DataConfig, image_folder: Path) -> None:
        (image_folder / "train" / "cat" / "1.png").write_bytes(b"")
        loader = ImageData(replace(config, workers=2)).train_dataloader()
        with pytest.raises(DataError, match=r"^/\S+/cat/1\.png cannot be read[^\n]*data\.bad_images=skip$"):
            list(loader)
        end_workers(loader)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_in_training_the_next_one_takes_its_place(
        self, config: DataConfig, image_folder: Path, workers: int, capfd: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("1.png", "2.png"):
            (image_folder / "train" / "cat" / name).write_bytes(b"")
        loader: Any = ImageData(replace(config, workers=workers, bad_images="skip")).train_dataloader()
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch)
            batches = list(loader)
            indices = torch.cat([indices for _, _, indices in batches]).tolist()
            assert sorted(indices) == [0, 3, 3, 3, 4, 5, 6, 7]
            assert all(torch.equal(labels, (indices > 3).long()) for _, labels, indices in batches)
        reports = capfd.readouterr().err.splitlines()
        assert len(reports) == 2
        assert all(any(f"cat/{name} cannot be read" in line for line in reports) for name in ("1.png", "2.png"))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_in_evaluation_it_is_left_out(
        self, config: DataConfig, image_folder: Path, workers: int, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (image_folder / "test" / "dog" / "1.png").write_bytes(b"")
        data = ImageData(replace(config, workers=workers, bad_images="skip"))
        labels = torch.cat([labels for _, labels, _ in data.test_dataloader()])
        assert labels.tolist() == [0, 0, 0, 1, IGNORED, 1]
        assert accuracy(Always(1), data.test_dataloader(), classes=2, what="") == pytest.approx(2 / 5)
        assert len(data.test_images(6)) == 5
        assert len(capfd.readouterr().err.splitlines()) == 1

    def test_nothing_but_bad_images_is_an_error(self, config: DataConfig, image_folder: Path) -> None:
        for file in (image_folder / "train").glob("*/*.png"):
            file.write_bytes(b"")
        with pytest.raises(DataError, match="none of the training images can be read"):
            next(iter(ImageData(replace(config, bad_images="skip")).train_dataloader()))

    @pytest.mark.parametrize(("name", "mode"), [("gray.jpg", "L"), ("cmyk.jpg", "CMYK"), ("gray.png", "L")])
    def test_gray_and_printers_colours_are_read(
        self, config: DataConfig, image_folder: Path, name: str, mode: str
    ) -> None:
        folder = image_folder / "test" / "cat"
        for file in folder.iterdir():
            file.unlink()
        Image.new("RGB", (20, 20), (200, 200, 200)).convert(mode).save(folder / name)
        pixels = ImageData(replace(config, mean=[0, 0, 0], std=[1, 1, 1])).test_images(6)[0]
        torch.testing.assert_close(pixels, torch.full((3, 16, 16), 200 / 255), atol=0.02, rtol=0)

    @pytest.mark.parametrize("name", ["0.jpg", "0.png"])
    def test_a_truncated_file_is_bad(self, config: DataConfig, image_folder: Path, name: str) -> None:
        file = image_folder / "test" / "cat" / name
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(DataError, match=rf"cat/{name} cannot be read"):
            ImageData(config).test_images(6)


@pytest.mark.parametrize(
    ("progressive", "message"),
    [
        ({"from": 32, "until": 0.5}, r"data\.progressive=from is unknown"),
        ({"start": 32}, r"needs to be start .* and until"),
        ({"start": 32, "until": 1.5}, r"needs to be start .* and until"),
        ({"start": "small", "until": 0.5}, r"needs to be start .* and until"),
        ({"start": 32, "until": 0.5}, r"start=32 is above data\.image_size=16"),
    ],
)
def test_a_growth_that_is_none_is_refused(config: DataConfig, progressive: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ImageData(replace(config, progressive=progressive))
