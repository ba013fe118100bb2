import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from repblocks.blocks import BLOCKS, RepVGGBlock
from repblocks.errors import ConfigurationError, DataError
from repblocks.training.build import (
    make_loggers,
    make_model,
    make_task,
    make_trainer,
    require_output,
    updates_per_epoch,
)
from repblocks.training.data import DataConfig, ImageData

CONFIGS = Path(__file__).parents[2] / "configs"


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
    config = configure("trainer=cpu", f"label_smoothing={smoothing}")
    with pytest.raises(ConfigurationError, match=r"label_smoothing=\S+ needs to be from 0 to 1"):
        make_task(config, nn.Identity(), digits, pl.Trainer(accelerator="cpu", logger=False, max_epochs=1))


class TestTrainer:
    def test_it_keeps_the_best_and_the_last_checkpoint(self, tiny: Any, tmp_path: Path) -> None:
        callback = make_trainer(tiny(), tmp_path).checkpoint_callback
        assert isinstance(callback, ModelCheckpoint)
        assert (callback.monitor, callback.mode, callback.save_last) == ("val/accuracy", "max", True)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_hardware_that_is_not_there_is_a_configuration_error(self, configure: Any, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"the trainer refuses its settings: .*(GPU|gpu)"):
            make_trainer(configure("trainer=gpu"), tmp_path)

    @pytest.mark.parametrize("wrong", ["+trainer.max_stepps=3", "trainer.precision=17", "trainer.strategy=dpd"])
    def test_what_lightning_refuses_is_a_configuration_error(self, tiny: Any, tmp_path: Path, wrong: str) -> None:
        with pytest.raises(ConfigurationError, match=r"the trainer refuses its settings: .*configs/trainer/"):
            make_trainer(tiny(wrong), tmp_path)

    @pytest.mark.parametrize(
        "wrong",
        [f"trainer.limit_{part}_batches=0" for part in ("train", "val")] + ["+trainer.check_val_every_n_epoch=2"],
    )
    def test_validation_must_run_because_it_chooses_the_checkpoint(self, tiny: Any, tmp_path: Path, wrong: str) -> None:
        with pytest.raises(ConfigurationError, match="validation would never run"):
            make_trainer(tiny(wrong), tmp_path)

    @pytest.mark.parametrize("epochs", ["0", "-1", "null", "abc", "1.5"])
    def test_no_or_strange_epochs_are_refused(self, tiny: Any, tmp_path: Path, epochs: str) -> None:
        with pytest.raises(ConfigurationError, match=r"trainer\.max_epochs=\S+ needs to be at least 1 and a whole"):
            make_trainer(tiny(f"trainer.max_epochs={epochs}"), tmp_path)

    @pytest.mark.parametrize("cut", ["fast_dev_run=true", "fast_dev_run=2", "max_steps=3", "max_time=00:00:01:00"])
    def test_ends_within_an_epoch_are_refused_before_training(self, tiny: Any, tmp_path: Path, cut: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"trainer\.{cut.partition('=')[0]}=.*use trainer\.max_epochs=1"):
            make_trainer(tiny(f"+trainer.{cut}"), tmp_path)

    @pytest.mark.parametrize("off", ["fast_dev_run=false", "max_steps=-1", "max_time=null"])
    def test_those_ends_may_be_switched_off(self, tiny: Any, tmp_path: Path, off: str) -> None:
        assert make_trainer(tiny(f"+trainer.{off}"), tmp_path).max_epochs == 1

    def test_a_sweep_does_not_start_processes_that_would_sweep_again(
        self, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            sweep = compose("train", ["hydra.mode=MULTIRUN"], return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", sweep)
        make_trainer(configure("trainer=cpu"), tmp_path)
        with pytest.raises(ConfigurationError, match="torchrun"):
            make_trainer(configure("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"), tmp_path)


class TestLoggers:
    def test_metrics_go_to_the_run_folder(self, configure: Any, tmp_path: Path) -> None:
        (logger,) = make_loggers(configure()["logger"], tmp_path)
        assert Path(str(logger.log_dir)) == tmp_path

    def test_tensorboard_comes_beside_the_metrics(self, configure: Any, tmp_path: Path) -> None:
        _, logger = make_loggers(configure("logger=tensorboard")["logger"], tmp_path)
        assert Path(str(logger.log_dir)) == tmp_path / "tensorboard"

    def test_tensorboard_without_its_package_names_the_extra(
        self, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for package in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
            monkeypatch.setattr(sys.modules["lightning_fabric.loggers.tensorboard"], package, False)
        with pytest.raises(ConfigurationError, match=r'pip install "repblocks\[tensorboard\]"'):
            make_loggers(configure("logger=tensorboard")["logger"], tmp_path)

    def test_an_unknown_logger_names_the_others(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"logger\.name=tensorbord is unknown.*tensorboard"):
            make_loggers({"name": "tensorbord"}, tmp_path)


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
    assert updates_per_epoch(ImageData(DataConfig(**config["data"])), trainer) == updates
