from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repblocks.errors import DataError
from repblocks.models.registry import carry
from repblocks.training.build import make_model
from repblocks.training.data import DataConfig, ImageData
from repblocks.training.evaluation import accuracy, require_fit


class Always(nn.Module):
    """Answers the same class for every image."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.eye(2)[answer])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), 2)


@pytest.fixture
def folder_data(configure: Any, image_folder: Path) -> ImageData:
    overrides = (f"data.root={image_folder}", "data=imagefolder", "data.image_size=16", "data.batch_size=4")
    return ImageData(DataConfig(**configure(*overrides, "data.workers=0")["data"]))


def test_accuracy_is_the_fraction_of_images_whatever_the_batches(folder_data: ImageData, image_folder: Path) -> None:
    (image_folder / "test" / "dog" / "0.png").unlink()
    data = ImageData(folder_data.config)
    cat, dog = (accuracy(Always(label), data.test_dataloader(), classes=2, what="") for label in (0, 1))
    assert (cat, dog) == pytest.approx((3 / 5, 2 / 5))


def fitted(data: ImageData, **args: Any) -> nn.Module:
    tiny = {"depths": [1, 1, 1], "widths": [8, 8, 8], **args}
    return make_model({"name": "rb_repvgg_cifar", "pretrained": False, "args": tiny}, data)


def test_a_model_fits_the_data_it_was_made_for(folder_data: ImageData) -> None:
    require_fit(fitted(folder_data), folder_data)


def test_another_number_of_classes_is_refused(configure: Any, folder_data: ImageData) -> None:
    digits = ImageData(DataConfig(**configure()["data"]))
    with pytest.raises(DataError, match="the model has 10 classes and data=imagefolder has 2"):
        require_fit(fitted(digits), folder_data)


def test_other_class_names_are_refused(folder_data: ImageData) -> None:
    with pytest.raises(DataError, match="calls one 'wolf' where the data says 'dog'"):
        require_fit(carry(fitted(folder_data), {"label_names": ["cat", "wolf"]}), folder_data)


def test_other_channels_are_refused(folder_data: ImageData) -> None:
    gray = ImageData(replace(folder_data.config, in_chans=1, mean=(0.5,), std=(0.5,)))
    with pytest.raises(DataError, match=r"takes images of 1 channel\(s\).*data\.in_chans=1"):
        require_fit(fitted(gray), folder_data)
