import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch


@pytest.mark.slow
def test_train_takes_the_arguments_of_hydra(tmp_path: Path) -> None:
    tiny = ("+model.args.depths=[1,1,1]", "+model.args.widths=[8,8,8]", "trainer=cpu", "trainer.max_epochs=1")
    brief = ("trainer.limit_train_batches=2", "export.formats=[]", f"hydra.run.dir={tmp_path / 'run'}")
    command = [sys.executable, "-m", "repblocks", "train", *tiny, *brief]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["equivalence"]["passed"]


@pytest.mark.slow
def test_train_prints_its_summaries_as_json_alone(tmp_path: Path) -> None:
    tiny = ("+model.args.depths=[1,1,1]", "+model.args.widths=[8,8,8]", "trainer=cpu", "trainer.max_epochs=1")
    brief = ("trainer.limit_train_batches=2", "export.formats=[]", f"hydra.sweep.dir={tmp_path / 'runs'}")
    command = [sys.executable, "-m", "repblocks", "train", "--json", "--multirun", "seed=0,1", *tiny, *brief]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [summary["seed"] for summary in json.loads(done.stdout)] == [0, 1]
    assert "rb_repvgg_cifar on digits" in done.stderr


def test_validate_measures_both_forms(command: Any, trained: Path) -> None:
    said = command("validate", trained, "data=digits", "--json")
    assert said.code == 0, said.err
    assert said.json["train"]["test_accuracy"] == said.json["deploy"]["test_accuracy"]
    assert "test accuracy" in command("validate", trained, "data=digits").out


def test_overrides_that_are_not_about_data_are_refused(command: Any, trained: Path) -> None:
    said = command("validate", trained, "trainer=gpu")
    assert said.code == 1
    assert "not about the data" in said.err


def test_validate_takes_whatever_names_a_model(command: Any, trained: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict(), tmp_path / "theirs.pth")
    said = command("validate", f"test_resnet@{tmp_path / 'theirs.pth'}", "data=digits", "data.image_size=32", "--json")
    assert said.code == 0, said.err
    assert said.json["deploy"]["params"] < said.json["train"]["params"]
