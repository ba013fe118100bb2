import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from repblocks.errors import CheckpointError
from repblocks.training.checkpoints.restore import model_from_checkpoint


@pytest.fixture
def checkpoint(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(finished_run / "checkpoints" / "best.ckpt", tmp_path))


def test_it_gives_the_trained_model_back_with_what_it_carries(checkpoint: Path) -> None:
    model: Any = model_from_checkpoint(checkpoint)
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not model.training
    assert all(torch.equal(value, weights[f"model.{key}"]) for key, value in model.state_dict().items())
    assert model.pretrained_cfg["label_names"] == tuple(str(digit) for digit in range(10))
    assert tuple(model.pretrained_cfg["input_size"]) == (1, 32, 32)


def test_a_missing_file_says_where_checkpoints_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*none\.ckpt; checkpoints are in RUN/checkpoints/"):
        model_from_checkpoint(tmp_path / "none.ckpt")


def test_a_truncated_file_is_recognised(checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 10):
        checkpoint.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is truncated or not a checkpoint"):
            model_from_checkpoint(checkpoint)


class Payload:
    ran = False

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return setattr, (Payload, "ran", True)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "hostile.ckpt"
    if writer == "torch":
        torch.save({"state_dict": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError):
        model_from_checkpoint(path)
    assert not Payload.ran


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"epoch": 3}, [1, 2]])
def test_a_foreign_checkpoint_is_recognised(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match=r"not a checkpoint of train\.py"):
        model_from_checkpoint(tmp_path / "foreign.ckpt")


def test_weights_of_another_model_are_refused(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["repblocks"]["args"]["widths"] = [8, 8, 16]
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match=rf"the weights in {checkpoint} are not those of rb_repvgg_cifar"):
        model_from_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "no_such_model"}, "not registered here"),
        ({"model": 3}, "model is 3"),
        ({"model": "hf-hub:someone/something"}, "not registered here"),
        ({"args": ["widths"]}, r"args is \['widths'\]"),
        ({"args": {"pretrained": True}}, "asks to fetch other files"),
        ({"args": {"checkpoint_path": "/etc/passwd"}}, "asks to fetch other files"),
        ({"args": {"no_such_argument": 1}}, "does not build"),
        ({"format_version": 99}, "format version 99.*upgrade"),
        ({"classes": 3}, "classes is 3"),
    ],
)
def test_a_header_that_the_package_would_not_write_is_refused(
    checkpoint: Path, changes: dict[str, Any], words: str
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["repblocks"] |= changes
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match=words) as refused:
        model_from_checkpoint(checkpoint)
    assert str(checkpoint) in str(refused.value)


@pytest.mark.parametrize("part", ["header", "list", "no tensor"])
def test_parts_of_another_kind_are_refused(checkpoint: Path, part: str) -> None:
    content = torch.load(checkpoint, weights_only=True)
    state = {"list": [1, 2], "no tensor": {"model.head.weight": 3}}
    torch.save(content | ({"repblocks": 3} if part == "header" else {"state_dict": state[part]}), checkpoint)
    with pytest.raises(CheckpointError, match=rf"of {checkpoint} is damaged"):
        model_from_checkpoint(checkpoint)


def test_a_damaged_archive_is_recognised(checkpoint: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    at = content.index(b"state_dict")
    content[at - 40 : at] = bytes(40)
    checkpoint.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is truncated or not a checkpoint|is foreign"):
        model_from_checkpoint(checkpoint)


def test_a_text_file_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,lr,step\n0,0.1,3\n")
    with pytest.raises(CheckpointError, match=r"metrics\.csv is truncated or not a checkpoint"):
        model_from_checkpoint(tmp_path / "metrics.csv")
