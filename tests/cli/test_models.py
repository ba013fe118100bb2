import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import repblocks as rb

TIMES = "\u00d7"
FUNCTION = """
import torch
from torch import nn

class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x))

def make():
    return Parallel()

def wrong():
    return 3
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_nets.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users_nets", raising=False)
    return "users_nets"


def test_list_counts_both_forms(command: Any) -> None:
    said = command("list", "rb_repvgg_cifar", "--json")
    (row,) = said.json
    model = rb.create_model("rb_repvgg_cifar")
    assert row["train"] == rb.profile(model, (3, 32, 32)).to_dict()
    assert row["deploy"] == rb.profile(rb.deployed(model), (3, 32, 32)).to_dict()
    assert "rb_repvgg_cifar" in command("list", "rb_repvgg_c*").out


def test_describe_shows_branches_and_what_they_fold_into(command: Any, trained: Path) -> None:
    described = command("describe", trained, "--json").json
    block = described["blocks"]["stages.0.0.conv"]
    assert block["branches"] == {"kxk": [f"conv 3{TIMES}3", "BatchNorm"], "pointwise": [f"conv 1{TIMES}1", "BatchNorm"]}
    assert block["folds_into"] == {"conv": f"3{TIMES}3 conv, 8 → 8, stride 2"}
    assert f"kxk: conv 3{TIMES}3 - BatchNorm" in command("describe", trained).out
    assert "after the branches:" in command("describe", "rb_repnext_u3_tiny").out


def test_describe_shows_what_collapse_would_merge_where_no_block_is_ours(command: Any, users_module: str) -> None:
    (region,) = command("describe", f"{users_module}:make", "--json").json["regions"]
    assert region["modules"] == ["a", "b", "add in the model"]
    assert "a, b, add in the model = Conv2d(3, 4, kernel_size=(3, 3)" in command("describe", f"{users_module}:make").out


def test_collapse_takes_names_files_and_functions(command: Any, trained: Path, users_module: str) -> None:
    for source in ("resnet18", trained, f"{users_module}:make"):
        said = command("collapse", source, "--size", "1x32x32" if source == trained else "3x32x32", "--json")
        assert said.code == 0, said.err
        assert said.json["equivalence"]["passed"]


def test_collapse_writes_what_it_made(command: Any, users_module: str, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    assert command("collapse", f"{users_module}:make", "--size", "3x16x16", "--out", out).code == 0
    weights = load_file(out)
    assert [tuple(value.shape) for value in weights.values() if value.ndim == 4] == [(4, 3, 3, 3)]


@pytest.mark.parametrize(("function", "words"), [("wrong", "returned int"), ("missing", "cannot call")])
def test_functions_that_give_no_module_are_refused(command: Any, users_module: str, function: str, words: str) -> None:
    said = command("collapse", f"{users_module}:{function}")
    assert said.code == 1
    assert words in said.err


def test_verify_succeeds_for_equal_models_only(command: Any, trained: Path, tmp_path: Path) -> None:
    deploy = tmp_path / "deploy.safetensors"
    rb.save(rb.deployed(rb.load(trained)), deploy)
    same = command("verify", trained, deploy, "--json")
    assert (same.code, same.json["passed"]) == (0, True)
    other: Any = rb.load(trained)
    with torch.no_grad():
        other.head.fc.bias += 1
    rb.save(other, deploy)
    differs = command("verify", trained, deploy, "--json")
    assert (differs.code, differs.json["passed"]) == (1, False)


def test_convert_renames_weights_both_ways(command: Any, tmp_path: Path) -> None:
    theirs = timm.create_model("repvgg_a0").state_dict()
    save_file(theirs, tmp_path / "theirs.safetensors")
    there = command(
        "convert", tmp_path / "theirs.safetensors", "--model", "rb_repvgg_a0", "--out", tmp_path / "ours.safetensors"
    )
    assert there.code == 0, there.err
    rb.create_model("rb_repvgg_a0").load_state_dict(load_file(tmp_path / "ours.safetensors"))
    options = ("--model", "rb_repvgg_a0", "--target", "timm", "--out", tmp_path / "back.safetensors")
    assert command("convert", tmp_path / "ours.safetensors", *options).code == 0
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[key], value) for key, value in theirs.items())


def test_files_that_hold_no_weights_are_refused(command: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_bytes(b"nothing")
    torch.save({"epoch": 3}, tmp_path / "notes.pt")
    for name, words in (("notes.safetensors", "cannot be read as weights"), ("notes.pt", "holds no weights")):
        said = command("convert", tmp_path / name, "--out", tmp_path / "out.safetensors")
        assert said.code == 1
        assert words in " ".join(said.err.replace("│", " ").split())
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("size", ["224", "3x224", "axbxc"])
def test_a_size_that_is_none_is_refused(command: Any, size: str) -> None:
    said = command("collapse", "resnet18", "--size", size)
    assert said.code == 1
    assert "3x224x224" in said.err
