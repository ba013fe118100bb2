import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
