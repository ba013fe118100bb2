import hashlib
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from repblocks.errors import CheckpointError
from repblocks.files import remove_unfinished
from repblocks.training.checkpoints.files import (
    CheckpointFiles,
    hash_file,
    newest_intact,
    read_checkpoint,
    step_of,
    write_checkpoint,
)

CONTENT = {"state_dict": {"weight": torch.arange(5.0)}, "epoch": 3, "names": ["a", "b"]}


class Code:
    """What an attacker would put into a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("made by a pickle",)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def bit_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def without_hash(path: Path) -> None:
    hash_file(path).unlink()


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"step-{step:08d}.ckpt" for step in (9, 10, 100)]
    for path in paths:
        write_checkpoint({**CONTENT, "step": step_of(path)}, path)
    return paths


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 2,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_checkpoint(CONTENT, tmp_path / "a" / "step-00000001.ckpt")
    read = read_checkpoint(tmp_path / "a" / "step-00000001.ckpt")
    assert torch.equal(read["state_dict"]["weight"], CONTENT["state_dict"]["weight"])
    assert (read["epoch"], read["names"]) == (3, ["a", "b"])


def test_the_hash_beside_it_is_that_of_sha256sum(three: list[Path]) -> None:
    digest = hashlib.sha256(three[0].read_bytes()).hexdigest()
    assert hash_file(three[0]).read_text() == f"{digest}  step-00000009.ckpt\n"


def test_nothing_else_is_left_in_the_folder(three: list[Path]) -> None:
    names = {path.name for path in three} | {f"{path.name}.sha256" for path in three}
    assert {path.name for path in three[0].parent.iterdir()} == names


def test_content_and_names_are_on_the_disk_in_an_order_that_survives_a_loss_of_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        sync(descriptor)

    def replaced(source: Path, target: Path) -> Path:
        events.append(f"rename {target.suffix}")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_checkpoint(CONTENT, tmp_path / "step-00000001.ckpt")
    assert events == ["sync file", "rename .sha256", "sync folder", "sync file", "rename .ckpt", "sync folder"]


@pytest.mark.parametrize("damage", [truncated, emptied, bit_flipped])
def test_damage_is_seen(three: list[Path], damage: Any) -> None:
    damage(three[2])
    with pytest.raises(CheckpointError, match=r"step-00000100\.ckpt is truncated or not a checkpoint"):
        read_checkpoint(three[2])


@pytest.mark.parametrize("damage", [truncated, emptied, bit_flipped, without_hash])
def test_the_newest_that_is_intact_is_found_and_damaged_ones_are_reported(three: list[Path], damage: Any) -> None:
    damage(three[2])
    path, reasons = newest_intact(three[0].parent)
    assert path == three[1]
    assert len(reasons) == 1
    assert str(three[2]) in reasons[0]


def test_an_intact_newest_checkpoint_is_taken_without_a_word(three: list[Path]) -> None:
    assert newest_intact(three[0].parent) == (three[2], [])


def test_where_all_are_damaged_there_is_none(three: list[Path]) -> None:
    for path in three:
        bit_flipped(path)
    path, reasons = newest_intact(three[0].parent)
    assert path is None
    assert len(reasons) == 3


@pytest.mark.parametrize("options", [{}, {"weights_only": False}, {"weights_only": True}])
def test_pickled_code_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Code()}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt is foreign"):
        CheckpointFiles().load_checkpoint(tmp_path / "bad.ckpt", **options)
    assert not (tmp_path / "made by a pickle").exists()


def test_addresses_are_not_fetched() -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        CheckpointFiles().load_checkpoint("http://127.0.0.1:9/last.ckpt", weights_only=False)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_reported_with_the_path_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    good, bad = tmp_path / "step-00000001.ckpt", tmp_path / "step-00000002.ckpt"
    write_checkpoint({"small": 1}, good)
    with pytest.raises(CheckpointError, match=r"cannot write .*step-00000002\.ckpt .*File too large"):
        write_checkpoint({"large": torch.zeros(10_000)}, bad)
    assert newest_intact(tmp_path) == (good, [])
    assert {path.name for path in tmp_path.iterdir()} == {good.name, hash_file(good).name}


def test_what_killed_processes_left_is_removed_and_checkpoints_stay(three: list[Path]) -> None:
    folder = three[0].parent
    for name in (".step-00000101.1a2b3c4d.ckpt", ".step-00000101.ckpt.1a2b3c4d.sha256"):
        (folder / name).write_bytes(b"half")
    remove_unfinished(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert newest_intact(folder)[0] == three[2]


def test_a_checkpoint_is_removed_with_its_hash(three: list[Path]) -> None:
    CheckpointFiles().remove_checkpoint(three[0])
    assert not three[0].exists()
    assert not hash_file(three[0]).exists()


def test_a_link_is_read_and_checked_as_the_file_it_stands_for(three: list[Path]) -> None:
    link = three[0].parent / "last.ckpt"
    link.symlink_to(three[2].name)
    assert read_checkpoint(link)["step"] == 100
    bit_flipped(three[2])
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        read_checkpoint(link)
