import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from repblocks.checkpoint import save
from repblocks.cli.sources import model_from
from repblocks.errors import CheckpointError, ConfigurationError, DataError
from repblocks.expansion.expand import expand
from repblocks.models import create_model
from repblocks.training import model_from_checkpoint, run
from repblocks.training.console import quiet_lightning
from repblocks.training.entry import configs
from repblocks.training.summary import Summary
from repblocks.training.validation import data_config, data_for, preprocessing, validate

CHECKPOINT, DEPLOY = Path("checkpoints/best.ckpt"), Path("deploy/model.safetensors")
TINY = ("+model.args.depths=[1,1,1]", "+model.args.widths=[8,8,8]", "data.image_size=24", "data.mean=[0.4]")
BRIEF = ("trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "export.formats=[safetensors]")


def validated(path: Path, overrides: Sequence[str] = ()) -> Summary:
    return validate(model_from(str(path)), overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run on smaller digits with another mean than the configuration's."""
    folder = tmp_path_factory.mktemp("run")
    with initialize_config_dir(str(configs()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("train", [*TINY, *BRIEF]), resolve=True)
    with warnings.catch_warnings():
        quiet_lightning()
        run(config, folder)
    return folder


def test_a_checkpoint_is_measured_in_both_forms(finished: Path) -> None:
    summary = validated(finished / CHECKPOINT)
    assert list(summary.forms) == ["train", "deploy"]
    assert summary.forms["train"].test_accuracy == summary.forms["deploy"].test_accuracy
    assert summary.equivalence is not None
    assert summary.equivalence.passed


def test_a_deploy_file_is_measured_in_deploy_form(finished: Path) -> None:
    summary = validated(finished / DEPLOY)
    assert list(summary.forms) == ["deploy"]
    assert summary.forms["deploy"].test_accuracy == validated(finished / CHECKPOINT).forms["deploy"].test_accuracy


def test_a_saved_train_form_is_measured_in_both_forms(finished: Path, tmp_path: Path) -> None:
    save(model_from_checkpoint(finished / CHECKPOINT), tmp_path / "train.safetensors")
    assert list(validated(tmp_path / "train.safetensors").forms) == ["train", "deploy"]


def test_an_expanded_model_is_measured_beside_the_plain_one_that_it_is(tmp_path: Path) -> None:
    plain = create_model("test_resnet", num_classes=10, in_chans=1)
    save(expand(plain, "acb").model.eval(), tmp_path / "expanded.safetensors")
    summary = validated(tmp_path / "expanded.safetensors", ["data.image_size=32"])
    assert list(summary.forms) == ["train", "deploy"]
    weights = [module for module in plain.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    biases = sum(len(module.weight) for module in weights)
    assert summary.forms["deploy"].params == sum(module.weight.numel() for module in weights) + biases
    assert summary.equivalence is not None
    assert summary.equivalence.passed


def test_images_are_prepared_as_in_training_unless_told_otherwise(finished: Path) -> None:
    own = preprocessing(model_from_checkpoint(finished / CHECKPOINT))
    values = data_config([*own, "data.image_size=40", "data.batch_size=7"])
    assert (values["image_size"], values["mean"], values["batch_size"]) == (40, [0.4], 7)
    assert data_config(own)["image_size"] == [24, 24]


def test_another_dataset_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root"):
        validated(finished / CHECKPOINT, ["data=imagefolder", f"data.root={tmp_path / 'none'}"])


def test_overrides_that_validation_would_ignore_are_refused(finished: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'trainer\.max_epochs=3' is not about the data"):
        validated(finished / CHECKPOINT, ["data=digits", "trainer.max_epochs=3"])


def test_images_that_do_not_fill_a_training_batch_can_be_validated(finished: Path) -> None:
    assert list(validated(finished / DEPLOY, ["data.batch_size=2000"]).forms) == ["deploy"]


def test_a_key_that_the_data_group_does_not_have_is_named(finished: Path) -> None:
    with pytest.raises(ConfigurationError, match="data=foo is unknown"):
        validated(finished / DEPLOY, ["+data.foo=1"])


def test_mistyped_overrides_are_named(finished: Path) -> None:
    with pytest.raises(ConfigurationError, match="batch_sise"):
        validated(finished / CHECKPOINT, ["data.batch_sise=3"])


@pytest.mark.parametrize(
    "name", ["foreign.ckpt", "truncated.ckpt", "foreign.safetensors", "missing.ckpt", "missing.safetensors"]
)
def test_files_that_cannot_be_read_are_refused(finished: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "truncated.ckpt":
        path.write_bytes((finished / CHECKPOINT).read_bytes()[:1000])
    elif name.startswith("foreign"):
        path.write_text("no model at all")
    with pytest.raises(CheckpointError, match=str(path)):
        validated(path)


def test_models_that_are_not_ours_are_measured_as_they_are_and_collapsed() -> None:
    summary = validate(create_model("test_resnet", num_classes=10, in_chans=1).eval(), ["data.image_size=32"])
    assert summary.model == "test_resnet"
    assert summary.forms["deploy"].params < summary.forms["train"].params
    assert summary.forms["deploy"].test_accuracy == summary.forms["train"].test_accuracy


def test_a_model_that_says_nothing_takes_images_as_the_data_gives_them() -> None:
    model = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    assert data_for(model, ["data.image_size=20"]).test_images(3).shape == (3, 1, 20, 20)
    assert list(validate(model).forms) == ["deploy"]
