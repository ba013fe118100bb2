import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from support import loaded_script

from repblocks.checkpoint import save
from repblocks.errors import CheckpointError, ConfigurationError, DataError
from repblocks.expansion.expand import expand
from repblocks.models import create_model
from repblocks.training import model_from_checkpoint, run
from repblocks.training.console import quiet_lightning

SCRIPT = Path(__file__).parent.parent / "scripts" / "validate.py"
CHECKPOINT, DEPLOY = Path("checkpoints/best.ckpt"), Path("deploy/model.safetensors")
TINY = ("+model.args.depths=[1,1,1]", "+model.args.widths=[8,8,8]", "data.image_size=24", "data.mean=[0.4]")
BRIEF = ("trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "export.formats=[safetensors]")


@pytest.fixture(scope="module")
def script() -> Any:
    return loaded_script(SCRIPT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run on smaller digits with another mean than the configuration's."""
    folder = tmp_path_factory.mktemp("run")
    with initialize_config_dir(str(SCRIPT.parent.parent / "configs"), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("train", [*TINY, *BRIEF]), resolve=True)
    with warnings.catch_warnings():
        quiet_lightning()
        run(config, folder)
    return folder


def test_a_checkpoint_is_measured_in_both_forms(script: Any, finished: Path) -> None:
    summary = script.validate(finished / CHECKPOINT)
    assert list(summary.forms) == ["train", "deploy"]
    assert summary.forms["train"].test_accuracy == summary.forms["deploy"].test_accuracy
    assert summary.equivalence.passed


def test_a_deploy_file_is_measured_in_deploy_form(script: Any, finished: Path) -> None:
    summary = script.validate(finished / DEPLOY)
    assert list(summary.forms) == ["deploy"]
    assert summary.forms["deploy"].test_accuracy == script.validate(finished / CHECKPOINT).forms["deploy"].test_accuracy


def test_a_saved_train_form_is_measured_in_both_forms(script: Any, finished: Path, tmp_path: Path) -> None:
    save(model_from_checkpoint(finished / CHECKPOINT), tmp_path / "train.safetensors")
    assert list(script.validate(tmp_path / "train.safetensors").forms) == ["train", "deploy"]


def test_an_expanded_model_is_measured_beside_the_plain_one_that_it_is(script: Any, tmp_path: Path) -> None:
    plain = create_model("test_resnet", num_classes=10, in_chans=1)
    save(expand(plain, "acb").model.eval(), tmp_path / "expanded.safetensors")
    summary = script.validate(tmp_path / "expanded.safetensors", ["data.image_size=32"])
    assert list(summary.forms) == ["train", "deploy"]
    assert summary.forms["deploy"].params == sum(parameter.numel() for parameter in plain.parameters())
    assert summary.equivalence.passed


def test_images_are_prepared_as_in_training_unless_told_otherwise(script: Any, finished: Path) -> None:
    own = script.preprocessing(model_from_checkpoint(finished / CHECKPOINT))
    values = script.data_config([*own, "data.image_size=40", "data.batch_size=7"])
    assert (values["image_size"], values["mean"], values["batch_size"]) == (40, [0.4], 7)
    assert script.data_config(own)["image_size"] == [24, 24]


def test_another_dataset_is_refused(script: Any, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root"):
        script.validate(finished / CHECKPOINT, ["data=imagefolder", f"data.root={tmp_path / 'none'}"])


def test_overrides_that_validation_would_ignore_are_refused(script: Any, finished: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'trainer\.max_epochs=3' is not about the data"):
        script.validate(finished / CHECKPOINT, ["data=digits", "trainer.max_epochs=3"])


def test_images_that_do_not_fill_a_training_batch_can_be_validated(script: Any, finished: Path) -> None:
    assert list(script.validate(finished / DEPLOY, ["data.batch_size=2000"]).forms) == ["deploy"]


def test_a_key_that_the_data_group_does_not_have_is_named(script: Any, finished: Path) -> None:
    with pytest.raises(ConfigurationError, match="data=foo is unknown"):
        script.validate(finished / DEPLOY, ["+data.foo=1"])


def test_mistyped_overrides_are_named(script: Any, finished: Path) -> None:
    with pytest.raises(ConfigurationError, match="batch_sise"):
        script.validate(finished / CHECKPOINT, ["data.batch_sise=3"])


@pytest.mark.parametrize(
    "name", ["foreign.ckpt", "truncated.ckpt", "foreign.safetensors", "missing.ckpt", "missing.safetensors"]
)
def test_files_that_cannot_be_read_are_refused(script: Any, finished: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "truncated.ckpt":
        path.write_bytes((finished / CHECKPOINT).read_bytes()[:1000])
    elif name.startswith("foreign"):
        path.write_text("no model at all")
    with pytest.raises(CheckpointError, match=str(path)):
        script.validate(path)


@pytest.mark.slow
def test_the_command_prints_a_table_or_one_block(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / DEPLOY, tmp_path)
    done, failed = (
        subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        for arguments in (["model.safetensors", "data=digits"], ["model.ckpt"])
    )
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert failed.returncode == 1
    assert "CheckpointError" in failed.stderr
    assert "Traceback" not in failed.stderr
