from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from repblocks.blocks import BLOCKS, RepVGGBlock
from repblocks.errors import ConfigurationError, DataError
from repblocks.training.build import make_model, make_task, require_output
from repblocks.training.data import DataConfig, ImageData
from repblocks.training.trainer import make_trainer


@pytest.fixture
def digits(configure: Any) -> ImageData:
    return ImageData(DataConfig(**configure()["data"]))


def model_config(**changes: Any) -> dict[str, Any]:
    return {"name": "rb_repvgg_cifar", "pretrained": False, "args": {}, **changes}


class TestModel:
    @pytest.mark.parametrize("name", ["rb_repvgg_cifar", "rb_repnext_cifar", "test_resnet"])
    def test_classes_and_channels_follow_the_data(self, digits: ImageData, name: str) -> None:
        model: Any = make_model(model_config(name=name), digits)
        assert model.eval()(digits.test_images(2)).shape == (2, 10)
        assert model.model_args["in_chans"] == 1

    @pytest.mark.parametrize("block", sorted(BLOCKS.keys() - {"repmixer"}))  # which keeps the map
    def test_any_linear_block_takes_the_place_of_the_networks_own(self, digits: ImageData, block: str) -> None:
        model: Any = make_model(model_config(args={"block": block}), digits)
        assert all(isinstance(layer.conv, BLOCKS[block]) for layer in model.modules() if isinstance(layer, RepVGGBlock))
        assert model.model_args["block"] == block

    def test_it_carries_preprocessing_and_class_names(self, digits: ImageData) -> None:
        carried: Any = make_model(model_config(), digits).pretrained_cfg
        assert carried["label_names"] == [str(digit) for digit in range(10)]
        assert (carried["input_size"], carried["mean"], carried["crop_pct"]) == ((1, 32, 32), (0.305,), 1.0)
        assert digits.preprocessing.mean == carried["mean"]

    @pytest.mark.parametrize(("args", "has"), [({"num_classes": 100}, 10), ({"in_chans": 3}, 1)])
    def test_arguments_against_the_data_are_refused(self, digits: ImageData, args: dict[str, int], has: int) -> None:
        key, value = next(iter(args.items()))
        with pytest.raises(DataError, match=rf"model\.args\.{key}={value}, but data=digits has {has}"):
            make_model(model_config(args=args), digits)

    def test_an_unknown_model_names_near_ones(self, digits: ImageData) -> None:
        with pytest.raises(ConfigurationError, match="rb_repvgg_cifar"):
            make_model(model_config(name="rb_repvgg_cifra"), digits)

    def test_an_argument_that_the_model_does_not_have_is_named(self, digits: ImageData) -> None:
        with pytest.raises(ConfigurationError, match=r"rb_repvgg_cifar refuses the arguments .*drop_rat"):
            make_model(model_config(args={"drop_rat": 0.1}), digits)


class TestOutput:
    def test_a_model_that_takes_the_images_stays_as_it_was(self, digits: ImageData) -> None:
        model = make_model(model_config(), digits)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        require_output(model, digits)
        assert model.training
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_a_model_for_another_image_size_is_refused(self, digits: ImageData) -> None:
        model = make_model(model_config(name="vit_tiny_patch16_224"), digits)
        with pytest.raises(
            ConfigurationError, match=r"vit_tiny\S+ on images of 32x32 .*data\.image_size .*args\.img_size"
        ):
            require_output(model, digits)

    def test_a_model_without_class_scores_is_refused(self, digits: ImageData) -> None:
        with pytest.raises(ConfigurationError, match="gives list, needed is one row of 10 class scores"):
            require_output(make_model(model_config(args={"features_only": True}), digits), digits)


@pytest.mark.parametrize("smoothing", ["2", "-0.1", "null", "abc"])
def test_an_impossible_label_smoothing_is_refused(configure: Any, digits: ImageData, smoothing: str) -> None:
    config = configure("trainer=cpu", f"objective.label_smoothing={smoothing}")
    with pytest.raises(ConfigurationError, match=r"label_smoothing=\S+ needs to be from 0 to"):
        make_task(config, nn.Identity(), digits, pl.Trainer(accelerator="cpu", logger=False, max_epochs=1))


@pytest.mark.parametrize(
    ("overrides", "updates"),
    [
        ([], 19),
        (["data.drop_last=false"], 20),
        (["trainer.accumulate_grad_batches=4"], 5),
        (["trainer.limit_train_batches=7"], 7),
        (["trainer.limit_train_batches=0.5"], 9),
        (["trainer.limit_train_batches=100"], 19),
    ],
)
def test_updates_per_epoch_come_from_sizes_alone(
    configure: Any, tmp_path: Path, overrides: list[str], updates: int
) -> None:
    config = configure("trainer=cpu", *overrides)
    trainer = make_trainer(config, tmp_path)
    data = ImageData(DataConfig(**config["data"]))
    task = make_task(config, make_model(config["model"], data), data, trainer)
    assert task.updates_per_epoch == updates
