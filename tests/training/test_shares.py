import csv
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import repblocks as rb
from repblocks.blocks.shares import branch_shares
from repblocks.errors import ConfigurationError
from repblocks.training.checkpoints.restore import model_from_checkpoint
from repblocks.training.pipeline import run
from repblocks.training.shares import shares_of
from repblocks.training.trainer import make_trainer


def logged(folder: Path) -> list[dict[str, float]]:
    """The shares of each epoch, as metrics.csv has them."""
    with (folder / "metrics.csv").open() as file:
        rows = [{key: value for key, value in row.items() if key.startswith("share/")} for row in csv.DictReader(file)]
    return [{key: float(value) for key, value in row.items()} for row in rows if any(row.values())]


def test_every_branch_of_every_block_is_logged_each_epoch(tiny: Any, tmp_path: Path) -> None:
    run(tiny("branch_shares=true", "trainer.max_epochs=2", "optimizer.lr=0.1"), tmp_path)
    first, last = logged(tmp_path)
    assert "share/stages.0.0.conv/pointwise" in last
    assert first != last
    trained = shares_of(model_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt"))
    assert last == pytest.approx(trained, rel=1e-6)


def test_shares_are_not_logged_unless_asked_for(finished_run: Path) -> None:
    assert logged(finished_run) == []


def test_blocks_with_one_branch_are_left_out() -> None:
    model = nn.Sequential(rb.ACConv(3, 4), nn.Sequential(rb.ConvBN(4, 4)), nn.Conv2d(4, 4, 1)).eval()
    expected = {f"share/0/{branch}": share for branch, share in branch_shares(model[0]).items()}
    assert shares_of(model) == expected
    assert len(expected) == 3
    assert shares_of(rb.deployed(model)) == {}


@pytest.mark.parametrize("wrong", ["maybe", "2", "null"])
def test_anything_but_yes_or_no_is_refused(tiny: Any, tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigurationError, match=r"branch_shares=\S+ needs to be true or false"):
        make_trainer(tiny(f"branch_shares={wrong}"), tmp_path)
