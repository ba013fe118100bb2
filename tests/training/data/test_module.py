from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from repblocks.errors import ConfigurationError, DataError
from repblocks.training.data import DataConfig, ImageData


@pytest.fixture
def folder_config(configure: Any, image_folder: Path) -> DataConfig:
    overrides = (f"data.root={image_folder}", "data=imagefolder", "data.image_size=[16,24]", "data.batch_size=3")
    return DataConfig(**configure(*overrides, "data.workers=0")["data"])


def test_batches_are_images_and_labels(folder_config: DataConfig) -> None:
    images, labels, _ = next(iter(ImageData(folder_config).train_dataloader()))
    assert images.shape == (3, 3, 16, 24)
    assert images.dtype == torch.float32
    assert set(labels.tolist()) <= {0, 1}


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [3, 3]), (False, [3, 3, 2])])
def test_training_drops_an_incomplete_batch_if_told_to(
    folder_config: DataConfig,
    drop_last: bool,  # noqa: FBT001 - a test case
    sizes: list[int],
) -> None:
    data = ImageData(replace(folder_config, drop_last=drop_last))
    assert [len(labels) for _, labels, _ in data.train_dataloader()] == sizes
    assert data.training_batches() == len(sizes)


def test_evaluation_sees_every_image_once_in_order(folder_config: DataConfig) -> None:
    data = ImageData(folder_config)
    assert torch.cat([labels for _, labels, _ in data.test_dataloader()]).tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.cat([labels for _, labels, _ in data.val_dataloader()]).tolist() == [0, 0, 1, 1]


def test_test_images_are_spread_over_the_classes(folder_config: DataConfig) -> None:
    data = ImageData(folder_config)
    everything = torch.cat([images for images, _, _ in data.test_dataloader()])
    torch.testing.assert_close(data.test_images(3), everything[::2])
    torch.testing.assert_close(data.test_images(100), everything)


def test_processes_share_the_batches(folder_config: DataConfig) -> None:
    data = ImageData(replace(folder_config, batch_size=2))
    assert [data.training_batches(processes) for processes in (1, 2, 3)] == [4, 2, 1]
    with pytest.raises(DataError, match="8 training images on 8 process"):
        data.training_batches(8)


def test_fewer_images_than_a_batch_can_be_tested_but_not_trained_on(folder_config: DataConfig) -> None:
    data = ImageData(replace(folder_config, batch_size=9))
    assert len(data.test_images(100)) == 6
    with pytest.raises(
        DataError, match=r"8 training images .* data\.batch_size=9; lower it, or set data\.drop_last=false"
    ):
        data.training_batches()


@pytest.mark.parametrize(
    "wrong",
    [
        "batch_size=0",
        "batch_size=many",
        "workers=-1",
        "image_size=abc",
        "image_size=[8]",
        "image_size=0",
        "in_chans=x",
        "mean=0.5",
        "std=[a]",
        "crop_pct=2",
        "drop_last=3",
        "augment=null",
        "eval_size=0",
        "eval_size=[8]",
        "in_memory=2",
        "bad_images=ignore",
        "progressive=3",
        "+train_split=7",
        "+val_split=''",
        "+test_split=7",
        "+classes=0",
    ],
)
def test_a_wrong_value_is_named_with_what_it_needs_to_be(configure: Any, wrong: str) -> None:
    name = wrong.removeprefix("+").partition("=")[0]
    with pytest.raises(ConfigurationError, match=rf"data\.{name}=.* needs to be .*configs/data/"):
        DataConfig.of(configure(f"{'+' * wrong.startswith('+')}data.{wrong.removeprefix('+')}")["data"])


def test_a_key_that_does_not_exist_or_is_missing_is_named(configure: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"data=foo is unknown"):
        DataConfig.of(configure("+data.foo=1")["data"])
    with pytest.raises(ConfigurationError, match=r"lacks image_size, std"):
        DataConfig.of(configure("~data.image_size", "~data.std")["data"])


def test_gray_images_from_folders_average_the_colours_statistics(configure: Any, image_folder: Path) -> None:
    overrides = ("data=imagefolder", f"data.root={image_folder}", "data.image_size=16", "data.workers=0")
    data = ImageData(DataConfig.of(configure(*overrides, "data.in_chans=1")["data"]))
    assert data.preprocessing.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert data.preprocessing.std == pytest.approx([(0.229 + 0.224 + 0.225) / 3])
    assert data.test_images(2).shape == (2, 1, 16, 16)


def test_one_value_serves_three_channels(configure: Any) -> None:
    config = DataConfig.of(configure("data=cifar10", "data.mean=[0.4]", "data.std=[0.2]")["data"])
    assert (config.preprocessing().mean, config.preprocessing().std) == ((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


def test_worker_processes_load_the_same_images(folder_config: DataConfig) -> None:
    data = ImageData(replace(folder_config, workers=1))
    torch.testing.assert_close(torch.cat([images for images, _, _ in data.test_dataloader()]), data.test_images(100))
