import io
import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import webdataset
from PIL import Image
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

from repblocks.errors import DataError
from repblocks.training.data import IGNORED, DataConfig, ImageData
from repblocks.training.data.batches import Share
from repblocks.training.data.streams import Reach
from repblocks.training.evaluation import accuracy


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_shard(file: Path, keys: range, **changed: Any) -> None:
    """A shard as webdataset writes it; member ``k`` has class ``k % 3``."""
    with webdataset.TarWriter(str(file)) as writer:
        for key in keys:
            writer.write({"__key__": f"{key:04d}", "jpg": jpeg(key), "cls": str(key % 3).encode(), **changed})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """24 training images in four shards of unequal sizes, 11 validation images in two."""
    root = tmp_path / "shards"
    root.mkdir()
    for i, (first, last) in enumerate([(0, 5), (5, 12), (12, 16), (16, 24)]):
        write_shard(root / f"train-{i}.tar", range(first, last))
    write_shard(root / "val-0.tar", range(100, 108))
    write_shard(root / "val-1.tar", range(108, 111))
    return root


@pytest.fixture
def config(configure: Any, root: Path) -> DataConfig:
    splits = ("data.train_split='train-{0..3}.tar|24'", "data.val_split='val-{0..1}.tar|11'", "data.classes=3")
    sizes = ("data.image_size=16", "data.batch_size=4", "data.workers=0")
    return DataConfig.of(configure("data=wds", f"data.root={root}", *splits, *sizes)["data"])


def labels_of(loader: Any) -> list[int]:
    return torch.cat([labels for _, labels, _ in loader]).tolist()


def as_process(config: DataConfig, rank: int, processes: int) -> ImageData:
    data = ImageData(config)
    data.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    data.trainer.strategy.global_rank, data.trainer.strategy.world_size = rank, processes
    return data


class TestTraining:
    def test_an_epoch_has_every_image_once_shuffled(self, config: DataConfig) -> None:
        data = ImageData(config)
        loader: Any = data.train_dataloader()
        assert data.splits.sizes() == {"train": 24, "val": 11, "test": 11}
        assert len(loader) == data.training_batches() == 6
        orders = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            batches = list(loader)
            assert [images.shape for images, _, _ in batches] == [(4, 3, 16, 16)] * 6
            orders.append(labels_of(batches))
        assert [Counter(order) for order in orders] == [Counter({0: 8, 1: 8, 2: 8})] * 2
        assert len({tuple(order) for order in [*orders, [0, 1, 2] * 8]}) == 3

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_seed_and_the_epoch_determine_everything(self, config: DataConfig, workers: int) -> None:
        config = replace(config, workers=workers)
        epochs: list[list[Any]] = []
        for state, (seed, epoch) in enumerate([(0, 0), (0, 0), (1, 0), (0, 1)]):
            torch.manual_seed(state)
            loader: Any = ImageData(config, seed=seed).train_dataloader()
            loader.sampler.set_epoch(epoch)
            epochs.append(list(loader))
        assert_same(epochs[0], epochs[1])
        for other in epochs[2:]:
            assert not any(torch.equal(a[0], b[0]) for a, b in zip(other, epochs[0], strict=True))

    def test_an_image_is_augmented_in_another_way_each_time(self, config: DataConfig, root: Path) -> None:
        for i in range(4):
            write_shard(root / f"train-{i}.tar", range(6), jpg=jpeg(1))
        loader: Any = ImageData(config).train_dataloader()
        looks = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            looks += [image for images, _, _ in loader for image in images]
        assert len({image.numpy().tobytes() for image in looks}) == 48

    def test_each_process_and_worker_reads_its_own_shards(self, config: DataConfig) -> None:
        even = replace(config, workers=2, batch_size=2)
        loaders: list[Any] = [as_process(even, rank, 2).train_dataloader() for rank in (0, 1)]
        reads = [
            {member["__url__"] for member in islice(loader.stream.members(Reach(Share(rank, 2), worker, 2), 5), 4)}
            for rank, loader in enumerate(loaders)
            for worker in (0, 1)
        ]
        assert [len(shards) for shards in reads] == [1, 1, 1, 1]
        assert len(set.union(*reads)) == 4
        numbers = torch.cat([indices for loader in loaders for _, _, indices in loader]).tolist()
        assert len(set(numbers)) == len(numbers) == 24

    def test_more_streams_than_shards_are_refused(self, config: DataConfig) -> None:
        with pytest.raises(DataError, match=r"4 shard\(s\) cannot be shared by 5 streams.*lower data\.workers"):
            list(as_process(replace(config, batch_size=1), 0, 5).train_dataloader())

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("given_out", [0, 1, 3, 6])
    def test_a_loader_resumes_after_any_batch(self, config: DataConfig, workers: int, given_out: int) -> None:
        config = replace(config, workers=workers)
        whole: Any = ImageData(config).train_dataloader()
        whole.sampler.set_epoch(2)
        expected = list(whole)
        interrupted: Any = ImageData(config).train_dataloader()
        interrupted.sampler.set_epoch(2)
        before = list(islice(iter(interrupted), given_out))
        resumed: Any = ImageData(config).train_dataloader()
        resumed.load_state_dict(through_a_file(interrupted.state_dict()))
        after = list(resumed)
        if given_out == 6:
            whole.sampler.set_epoch(3)
            expected += list(whole)
        assert_same(before + after, expected)

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize(("moment", "steps"), [("on_train_batch_end", 8), ("on_train_epoch_end", 12)])
    def test_lightning_resumes_within_and_between_epochs(
        self, config: DataConfig, tmp_path: Path, workers: int, moment: str, steps: int
    ) -> None:
        config = replace(config, workers=workers)
        whole, before, after = Recorder(), Recorder(), Recorder()
        trainer(max_epochs=3).fit(whole, datamodule=ImageData(config))
        interrupted = trainer(max_epochs=3, callbacks=[KillAfter(moment, steps, tmp_path / "state.ckpt")])
        with pytest.raises(Killed):
            interrupted.fit(before, datamodule=ImageData(config))
        trainer(max_epochs=3).fit(after, datamodule=ImageData(config), ckpt_path=tmp_path / "state.ckpt")
        assert_same(before.batches + after.batches, whole.batches)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_loader_starts_where_it_is_told_to(self, config: DataConfig, workers: int) -> None:
        data = ImageData(replace(config, workers=workers))
        whole = list(data.train_dataloader())
        data.start_at(8)
        assert_same(list(data.train_dataloader()), whole[2:])


class TestEvaluation:
    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_every_image_is_evaluated_once_in_order(self, config: DataConfig, workers: int) -> None:
        data = ImageData(replace(config, workers=workers, batch_size=2))
        loader = data.val_dataloader()
        assert len(loader) == 6
        assert labels_of(loader) == [key % 3 for key in range(100, 111)]
        assert torch.cat([indices for _, _, indices in loader]).tolist() == list(range(11))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_processes_together_see_every_image_once(self, config: DataConfig, workers: int) -> None:
        config = replace(config, workers=workers, batch_size=2)
        parts = [list(as_process(config, rank, 3).val_dataloader()) for rank in range(3)]
        assert [len(part) for part in parts] == [2, 2, 2]
        counted = [i for part in parts for _, labels, indices in part for i in indices[labels != IGNORED].tolist()]
        assert sorted(counted) == list(range(11))

    def test_test_images_are_spread_over_the_shards(self, config: DataConfig) -> None:
        data = ImageData(config)
        everything = torch.cat([images for images, _, _ in data.test_dataloader()])
        torch.testing.assert_close(data.test_images(4), everything[::3])

    def test_another_number_of_images_than_was_said_is_an_error(self, config: DataConfig) -> None:
        for count in (10, 12):
            data = ImageData(replace(config, val_split=f"val-{{0..1}}.tar|{count}"))
            with pytest.raises(DataError, match=rf"hold 11 images, not {count} as the name of the split"):
                list(data.val_dataloader())


class TestNames:
    def test_shards_come_from_whatever_webdataset_opens(self, config: DataConfig, root: Path) -> None:
        (root / "_info.json").write_text("{}")
        data = ImageData(replace(config, root=f"pipe:cat {root}"))
        assert data.splits.train.files[0] == f"pipe:cat {root}/train-0.tar"
        assert labels_of(data.val_dataloader()) == [key % 3 for key in range(100, 111)]

    def test_a_file_of_facts_names_the_splits_and_the_field_of_the_label(self, config: DataConfig, root: Path) -> None:
        write_shard(root / "a.tar", range(4), json=json.dumps({"kind": 2}).encode())
        facts = {"name": "a", "num_samples": 4, "filenames": ["a.tar"], "shard_lengths": [4], "alt_label": "kind"}
        (root / "_info.json").write_text(json.dumps({"splits": {"a": facts}}))
        data = ImageData(replace(config, train_split="a", val_split="a"))
        assert labels_of(data.val_dataloader()) == [2, 2, 2, 2]
        assert data.training_batches() == 1

    def test_the_number_of_images_is_required(self, config: DataConfig) -> None:
        with pytest.raises(DataError, match=r"does not say how many images .*val-\{000\.\.049\}\.tar\|50000"):
            ImageData(replace(config, val_split="val-{0..1}.tar"))

    def test_a_split_that_does_not_exist_is_named(self, config: DataConfig) -> None:
        with pytest.raises(DataError, match=r"the split 'none' of data\.name=wds/images cannot be loaded"):
            ImageData(replace(config, val_split="none"))

    def test_classes_can_be_named_in_a_file(self, config: DataConfig, tmp_path: Path) -> None:
        (tmp_path / "names.txt").write_text("cat\nblack dog\nemu\n")
        data = ImageData(replace(config, classes=str(tmp_path / "names.txt")))
        assert data.class_names == ("cat", "black dog", "emu")
        with pytest.raises(DataError, match=r"does not name its classes; set data\.classes"):
            ImageData(replace(config, classes=None))


class TestBadMembers:
    @pytest.fixture(params=["no picture", "no label", "words for a label", "no image file"])
    def damaged(self, request: pytest.FixtureRequest, root: Path) -> Path:
        with webdataset.TarWriter(str(root / "val-1.tar")) as writer:
            bad: dict[str, Any] = {"__key__": "0109", "jpg": jpeg(109), "cls": b"1"}
            match request.param:
                case "no picture":
                    bad["jpg"] = bad["jpg"][:300]
                case "no label":
                    del bad["cls"]
                case "words for a label":
                    bad["cls"] = b"dog"
                case _:
                    del bad["jpg"]
            for member in ({"__key__": "0108", "jpg": jpeg(108), "cls": b"0"}, bad):
                writer.write(member)
            writer.write({"__key__": "0110", "jpg": jpeg(110), "cls": b"2"})
        return root

    def test_they_are_fatal_by_default_and_named(self, config: DataConfig, damaged: Path) -> None:
        with pytest.raises(DataError, match=rf"{damaged}/val-1\.tar/0109.* repair or remove it"):
            list(ImageData(config).val_dataloader())

    def test_a_worker_names_them_too(self, config: DataConfig, damaged: Path) -> None:
        loader: Any = ImageData(replace(config, workers=1)).val_dataloader()
        with pytest.raises(DataError, match=rf"{damaged}/val-1\.tar/0109.* repair or remove it"):
            list(loader)
        end_workers(loader.loader)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_they_can_be_left_out_of_an_evaluation(
        self, config: DataConfig, damaged: Path, workers: int, capfd: pytest.CaptureFixture[str]
    ) -> None:
        data = ImageData(replace(config, workers=workers, bad_images="skip"))
        labels = labels_of(data.val_dataloader())
        assert labels == [*[key % 3 for key in range(100, 109)], IGNORED, 2]
        assert accuracy(Always(1, 3), data.val_dataloader(), classes=3, what="") == pytest.approx(3 / 10)
        assert len(data.test_images(11)) == 10
        assert capfd.readouterr().err.count("val-1.tar/0109") == 1

    def test_in_training_the_next_one_takes_their_place(
        self, config: DataConfig, damaged: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        config = replace(config, train_split="val-{0..1}.tar|11", batch_size=1, bad_images="skip")
        loader: Any = ImageData(config).train_dataloader()
        labels = labels_of(loader)
        assert len(labels) == 11
        assert IGNORED not in labels
        loader.sampler.set_epoch(1)
        list(loader)
        assert capfd.readouterr().err.count("val-1.tar/0109") == 1

    @pytest.mark.parametrize("damage", ["truncated", "missing"])
    def test_a_damaged_shard_is_named(
        self, config: DataConfig, root: Path, damage: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        shard = root / "val-0.tar"
        if damage == "truncated":
            shard.write_bytes(shard.read_bytes()[:4000])
        else:
            shard.unlink()
        with pytest.raises(DataError, match=rf"{shard} cannot be"):
            list(ImageData(config).val_dataloader())
        labels = labels_of(ImageData(replace(config, bad_images="skip")).val_dataloader())
        assert len(labels) == 11
        assert labels[-1] == IGNORED
        assert f"{shard} cannot be" in capfd.readouterr().err

    def test_nothing_but_bad_images_is_an_error(self, config: DataConfig, root: Path) -> None:
        for i in range(4):
            write_shard(root / f"train-{i}.tar", range(3), jpg=b"")
        with pytest.raises(DataError, match="none of the training images can be read"):
            list(ImageData(replace(config, bad_images="skip")).train_dataloader())
