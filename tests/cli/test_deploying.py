import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

import repblocks as rb


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two real digits as files."""
    folder = tmp_path_factory.mktemp("photos")
    images: Any = load_digits()
    for i in range(2):
        Image.fromarray((images.images[i] * 15).astype(np.uint8)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_export_writes_a_folder_that_predicts(command: Any, trained: Path, photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deploy"
    said = command("export", trained, "data=digits", "--format", "safetensors,onnx", "--out", out, "--json")
    assert said.code == 0, said.err
    assert set(said.json["files"]) == {"safetensors", "onnx"}
    assert all(entry["equivalence"]["passed"] for entry in said.json["files"].values())
    assert json.loads((out / "deploy.json").read_text())["source"]["file"] == trained.name
    named = command("predict", out, *photos, "--top", "3", "--json").json
    expected = rb.load_deploy(out).predict(photos, top=3)
    assert [[each["label"] for each in best] for best in named.values()] == [
        [p.label for p in best] for best in expected
    ]
    assert "%" in command("predict", out, photos[0]).out


def test_int8_is_calibrated_on_the_data_and_stands_in_the_manifest(command: Any, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "deploy"
    options = ("--int8", "--int8-preparation", "equalized", "--max-drop", "1.0", "--out", out, "--json")
    said = command("export", trained, "data=digits", *options)
    assert said.code == 0, said.err
    assert said.json["int8"] is not None
    assert (out / "model.int8.onnx").is_file()
    assert "int8" in json.loads((out / "deploy.json").read_text())["files"]


def test_without_data_random_images_prove_the_files(command: Any, trained: Path, tmp_path: Path) -> None:
    said = command("export", trained, "--format", "safetensors", "--out", tmp_path / "deploy")
    assert said.code == 0, said.err
    assert "safetensors" in said.out


@pytest.mark.parametrize(("options", "words"), [(("--format", "onxx"), "onxx"), (("--pixels", "bytes"), "bytes")])
def test_wrong_choices_write_nothing(
    command: Any, trained: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    said = command("export", trained, "--out", tmp_path / "deploy", *options)
    assert said.code == 1
    assert words in said.err
    assert not (tmp_path / "deploy").exists()


def test_what_is_no_image_is_named(command: Any, trained: Path, tmp_path: Path) -> None:
    assert command("export", trained, "--format", "safetensors", "--out", tmp_path / "deploy").code == 0
    (tmp_path / "notes.png").write_text("no image")
    said = command("predict", tmp_path / "deploy", tmp_path / "notes.png")
    assert said.code == 1
    assert "notes.png" in "".join(said.err.replace("│", " ").split())


NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))
"""


def test_a_net_of_the_users_ships_collapsed_and_predicts_by_the_names_of_its_data(
    command: Any, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command from a function that makes a net to a folder that names classes, in float and in int8."""
    (tmp_path / "own_nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    said = command("export", "own_nets:make", "data=digits", "--int8", "--max-drop", "1", "--out", "deploy", "--json")
    assert said.code == 0, said.err
    assert list(said.json["files"]) == ["onnx", "pt2"]
    assert [node.op_type for node in onnx.load("deploy/model.onnx").graph.node].count("BatchNormalization") == 0
    program = torch.export.load("deploy/model.pt2")
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    labels = {name.label for name in rb.load_deploy("deploy", runtime="int8").predict(photos, top=10)[0]}
    assert labels == {str(digit) for digit in range(10)}


def test_weights_of_timm_ship_with_their_hash(command: Any, tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
    options = ("--format", "timm,onnx", "--size", "3x48x40", "--out", tmp_path / "deploy")
    said = command("export", f"test_resnet@{path}", *options)
    assert said.code == 0, said.err
    about = json.loads((tmp_path / "deploy" / "deploy.json").read_text())
    assert about["source"] == {"file": "theirs.pth", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert about["files"]["onnx"]["batch_norms"] == 0
    assert about["files"]["onnx"]["input"]["shape"] == ["batch", 3, 48, 40]


def test_one_deploy_file_is_enough_to_predict(command: Any, trained: Path, photos: list[Path], tmp_path: Path) -> None:
    assert command("export", trained, "--format", "safetensors,onnx,openvino", "--out", tmp_path / "deploy").code == 0
    expected = command("predict", tmp_path / "deploy", *photos, "--json").json
    for file in ("model.safetensors", "model.onnx", "model.xml", "deploy.json"):
        found = command("predict", tmp_path / "deploy" / file, *photos, "--json").json
        assert [best[0]["label"] for best in found.values()] == [best[0]["label"] for best in expected.values()]
    alone = command("predict", trained, photos[0], "--json")
    assert alone.json[str(photos[0])][0]["label"] == expected[str(photos[0])][0]["label"]
    (tmp_path / "deploy" / "other.onnx").write_bytes(b"other")
    said = command("predict", tmp_path / "deploy" / "other.onnx", *photos)
    assert said.code == 1
    assert "none of the files" in " ".join(said.err.replace("│", " ").split())
