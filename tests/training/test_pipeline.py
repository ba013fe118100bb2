import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from repblocks.blocks.base import deployed, form_of
from repblocks.checkpoint import load
from repblocks.errors import CheckpointError, ConfigurationError, DataError, VerificationError
from repblocks.models.registry import create_model
from repblocks.training.checkpoints.restore import model_from_checkpoint
from repblocks.training.pipeline import best_checkpoint, remarks, run


def test_a_run_leaves_checkpoints_metrics_summary_and_deploy_files(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(tiny(), tmp_path)
    assert summary is not None
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "checkpoints/step-00000002.ckpt",
        "checkpoints/step-00000002.ckpt.sha256",
        "deploy/deploy.json",
        "deploy/model.safetensors",
        "metrics.csv",
        "run.yaml",
        "summary.json",
    }
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"epoch", "lr", "train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= rows[0].keys()
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary.to_dict()))
    printed = capsys.readouterr().out
    for words in ("epoch   1/1", "test accuracy", "largest output difference", "latency", "deploy/model.safetensors"):
        assert words in printed


def test_a_format_whose_packages_are_missing_is_left_out_and_said(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    config = tiny()
    config["export"]["formats"] = None
    run(config, tmp_path)
    assert {path.name for path in (tmp_path / "deploy").iterdir()} == {"deploy.json", "model.safetensors"}
    assert "onnx is not exported: pip install 'repblocks[export]'" in capsys.readouterr().out


def test_the_summary_has_both_forms_and_their_equivalence(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    train, deploy = summary["train"], summary["deploy"]
    assert train["test_accuracy"] == deploy["test_accuracy"]
    assert train["params"] > deploy["params"]
    assert train["macs"] > deploy["macs"]
    assert train["latency_ms"] > 0
    assert summary["equivalence"]["passed"]
    assert summary["equivalence"]["max_abs_error"] > 0
    assert summary["images"] == {"train": 1257, "val": 180, "test": 360}
    assert {"data", "fit", "test", "export"} <= summary["seconds"].keys()
    assert {"python", "torch", "timm", "repblocks"} <= summary["versions"].keys()


def test_the_deploy_file_is_the_best_checkpoint_collapsed(finished_run: Path) -> None:
    deploy: Any = load(finished_run / "deploy" / "model.safetensors")
    trained = model_from_checkpoint(finished_run / "checkpoints" / "best.ckpt")
    images = torch.randn(3, 1, 27, 32, dtype=torch.float64)
    assert form_of(deploy) == "deploy"
    assert form_of(trained) == "train"
    torch.testing.assert_close(deploy.double()(images), trained.double()(images), rtol=1e-4, atol=1e-5)
    assert list(deploy.pretrained_cfg["label_names"]) == [str(digit) for digit in range(10)]
    assert list(deploy.pretrained_cfg["mean"]) == [0.305]


@pytest.mark.parametrize("name", ["rb_repnext_cifar", "test_resnet"])
def test_other_models_run_the_same_way(configure: Any, tiny: Any, tmp_path: Path, name: str) -> None:
    brief = ("trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "export.formats=[safetensors]")
    config = tiny(f"model.name={name}") if name.startswith("rb_") else configure(f"model.name={name}", *brief)
    summary = run(config, tmp_path)
    assert summary is not None
    assert summary.equivalence is not None
    assert summary.equivalence.passed


def test_a_model_without_blocks_is_said_to_have_one_form(configure: Any) -> None:
    said = "no block of this model collapses, so both its forms are the same"
    assert remarks(configure("export.formats=[]"), nn.Conv2d(1, 1, 1), None) == [said]
    assert remarks(configure("export.formats=[]"), create_model("rb_repvgg_cifar"), None) == []


def test_images_from_folders_run_the_same_way(tiny: Any, image_folder: Path, tmp_path: Path) -> None:
    data = (f"data.root={image_folder}", "data.image_size=[24,32]", "data.batch_size=4", "data.workers=0")
    summary = run(tiny("data=imagefolder", *data), tmp_path / "run")
    assert summary is not None
    deploy: Any = load(tmp_path / "run" / "deploy" / "model.safetensors")
    assert list(deploy.pretrained_cfg["label_names"]) == ["cat", "dog"]


def test_forms_that_differ_are_not_exported(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        collapsed = deployed(model)
        with torch.no_grad():
            next(collapsed.parameters()).mul_(1.5)
        return collapsed

    monkeypatch.setattr("repblocks.training.pipeline.deployed", wrong)
    with pytest.raises(VerificationError, match="the deploy form differs"):
        run(tiny(), tmp_path)
    assert not (tmp_path / "deploy").exists()
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_a_run_that_ends_without_validation_says_why_nothing_is_exported() -> None:
    with pytest.raises(CheckpointError, match="ended without a validation"):
        best_checkpoint(pl.Trainer(accelerator="cpu", logger=False))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("seed=abc", r"seed=abc needs to be a whole number"),
        ("seed=-1", r"seed=-1 needs to be"),
        ("seed=null", r"seed=None needs to be"),
        ("+data.foo=1", r"data=foo is unknown"),
        ("objective.label_smoothing=2", r"label_smoothing=2 needs to be"),
        ("trainer.max_epochs=null", r"trainer\.max_epochs=None needs to be"),
    ],
)
def test_a_wrong_value_stops_before_training(tiny: Any, tmp_path: Path, wrong: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        run(tiny(wrong), tmp_path)
    assert not list(tmp_path.iterdir())


def test_fewer_images_than_a_batch_stop_before_training(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1257 training images .*lower it, or set data\.drop_last=false"):
        run(tiny("data.batch_size=2000"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_export_format_stops_before_training(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="onxx"):
        run(tiny("export.formats=[onxx]"), tmp_path)
    assert not list(tmp_path.iterdir())
