"""What a command line can name: weights of one's own, and deploy graphs."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import repblocks as rb
from repblocks.cli.sources import model_from


@pytest.mark.parametrize("wrapped", ["bare", "trained", "averaged"])
def test_weights_of_ones_own_fill_a_model_by_name(tmp_path: Path, wrapped: str) -> None:
    """Classes and channels are read from the weights; of a checkpoint of timm's train.py the averaged ones count."""
    torch.manual_seed(0)
    theirs = timm.create_model("resnet10t", num_classes=7, in_chans=1)
    weights = theirs.state_dict()
    parallel = {f"module.{key}": value for key, value in weights.items()}
    noise = {key: torch.zeros_like(value) for key, value in weights.items()}
    content = {
        "bare": weights,
        "trained": {"epoch": 3, "state_dict": parallel},
        "averaged": {"state_dict": noise, "state_dict_ema": weights},
    }
    torch.save(content[wrapped], tmp_path / "theirs.pth")
    model = model_from(f"resnet10t@{tmp_path / 'theirs.pth'}")
    images = torch.randn(2, 1, 64, 48)
    assert torch.equal(model(images), theirs.eval()(images))


def test_weights_of_our_models_without_a_header_do_too(tmp_path: Path) -> None:
    ours = rb.create_model("rb_repvgg_cifar", num_classes=3)
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    model = model_from(f"rb_repvgg_cifar@{tmp_path / 'ours.safetensors'}")
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in model.state_dict().items())


def test_weights_of_another_model_are_refused(command: Any, tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "theirs.pth")
    said = command("describe", f"resnet18@{tmp_path / 'theirs.pth'}")
    assert said.code == 1
    assert "does not fit resnet18" in said.err


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize("kind", ["code", "text", "missing", "headless"])
def test_hostile_weights_are_refused_in_one_block(
    command: Any, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs.pth"
    if kind == "code":
        torch.save({"state_dict": Hostile()}, path)
    elif kind == "text":
        path.write_text("no weights")
    elif kind == "headless":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/notes.txt", "nothing")
    said = command("describe", f"resnet10t@{path}")
    assert said.code == 1
    assert "CheckpointError" in said.err
    assert "cannot be read as weights" in " ".join(said.err.replace("│", " ").split())
    assert "code ran" not in said.out + said.err + capsys.readouterr().out


def test_verify_runs_graphs_in_their_own_runtimes(command: Any, trained: Path, tmp_path: Path) -> None:
    formats = "safetensors,onnx,pt2,openvino"
    assert command("export", trained, "--format", formats, "--out", tmp_path / "deploy").code == 0
    for name in ("model.safetensors", "model.onnx", "model.pt2", "model.xml"):
        said = command("verify", trained, tmp_path / "deploy" / name, "--json")
        assert said.code == 0, said.err
        assert 0 < said.json["relative_error"] < 1e-4
    alone = tmp_path / "alone.onnx"
    alone.write_bytes((tmp_path / "deploy" / "model.onnx").read_bytes())
    assert command("verify", trained, alone).code == 0
    assert command("verify", "rb_repvgg_cifar", alone).code == 1


def test_verify_refuses_graphs_that_were_swapped_or_take_pixels(command: Any, trained: Path, tmp_path: Path) -> None:
    for pixels in ("normalized", "uint8"):
        options = ("--format", "onnx", "--pixels", pixels, "--out", tmp_path / pixels)
        assert command("export", trained, *options).code == 0
    said = command("verify", trained, tmp_path / "uint8" / "model.onnx")
    assert said.code == 1
    assert "takes pixels" in said.err
    (tmp_path / "normalized" / "model.onnx").write_bytes((tmp_path / "uint8" / "model.onnx").read_bytes())
    said = command("verify", trained, tmp_path / "normalized" / "model.onnx")
    assert said.code == 1
    assert "not the file that was exported" in " ".join(said.err.replace("│", " ").split())
