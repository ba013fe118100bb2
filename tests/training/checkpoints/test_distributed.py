import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import loaded_script

from repblocks.training.checkpoints.files import read_checkpoint

ROOT = Path(__file__).parents[3]
differing = loaded_script(ROOT / "scripts" / "fault_drill.py").differing

pytestmark = pytest.mark.slow


def drilled(folder: Path, case: str) -> Path:
    """The folder of run folders that a case of the drill leaves."""
    command = [sys.executable, str(Path(__file__).with_name("distributed_drill.py")), str(folder), case]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    subprocess.run(command, check=True, capture_output=True, timeout=240, env=environment)
    return folder


def last(run: Path) -> dict[str, Any]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt")


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one)


def test_two_processes_with_half_batches_give_the_weights_of_one(tmp_path: Path) -> None:
    folder = drilled(tmp_path, "same_weights")
    one, two = last(folder / "one"), last(folder / "two")
    assert (one["global_step"], two["global_step"]) == (20, 20)
    assert two["geometry"]["processes"] == 2
    for weights in ("state_dict", "current_model_state"):
        assert furthest(one[weights], two[weights]) < 1e-10
    assert furthest(two["state_dict"], two["current_model_state"]) > 1e-6  # they do train
    # One process writes: one row per epoch, one record, and as many files as a single process.
    assert len(rows(folder / "two")) == 1
    assert yaml.safe_load((folder / "two" / "run.yaml").read_text())["config"]["trainer"]["devices"] == 2
    names = [sorted(path.name for path in (folder / run).rglob("*")) for run in ("one", "two")]
    assert names[0] == names[1]
    for key in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        assert float(rows(folder / "one")[0][key]) == pytest.approx(float(rows(folder / "two")[0][key]), rel=1e-6)


def test_a_run_of_two_processes_goes_on_with_one_from_the_middle_of_an_epoch(tmp_path: Path) -> None:
    folder = drilled(tmp_path, "other_world_size")
    two, one = last(folder / "two"), last(folder / "one with the batches of two")
    assert (two["global_step"], one["global_step"]) == (39, 39)
    assert (two["geometry"]["processes"], one["geometry"]["processes"]) == (2, 1)
    for weights in ("state_dict", "current_model_state"):
        assert furthest(one[weights], two[weights]) < 1e-10
    for key in ("train/loss", "train/accuracy", "val/loss"):
        values = [float(rows(folder / name)[0][key]) for name in ("two", "one with the batches of two")]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    # With 16 images per step the 12 steps of 32 images are followed by 54 for the rest of the 1,257.
    smaller = last(folder / "one with half the images per step")
    assert smaller["global_step"] == 12 + (1257 - 12 * 32) // 16
    assert smaller["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 1257 // 16


def test_collapsed_copies_are_validated_every_epoch_beside_averages(tmp_path: Path) -> None:
    folder = drilled(tmp_path, "with_averages_and_collapsed_copies")
    table = rows(folder / "two")
    assert [row["epoch"] for row in table] == ["0", "1", "2"]
    for row in table:
        assert float(row["val/deploy_accuracy"]) == pytest.approx(float(row["val/accuracy"]), abs=1e-6)
    assert (folder / "two" / "deploy" / "model.safetensors").is_file()
    assert any("branches" in key for key in last(folder / "two")["state_dict"])


def test_a_run_of_two_processes_that_goes_on_with_two_gives_the_same(tmp_path: Path) -> None:
    folder = drilled(tmp_path, "one_after_the_other")
    assert not differing(last(folder / "undisturbed"), last(folder / "resumed"))
    assert rows(folder / "undisturbed") == rows(folder / "resumed")


def test_a_killed_process_ends_the_job_with_its_error(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "train.py")
    tiny = ("+model.args.depths=[1,1,1]", "+model.args.widths=[8,8,8]", "data.batch_size=16", "trainer.max_epochs=9999")
    where = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", f"hydra.run.dir={tmp_path}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *launch, *tiny, *where, "checkpoint.keep=1"]
    with (tmp_path / "said.txt").open("w") as said:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        try:
            second = rank_once_trained(job.pid, tmp_path, 1)
            os.kill(second, signal.SIGKILL)
            start = time.monotonic()
            code = job.wait(timeout=60)
        finally:
            job.kill()
    took = time.monotonic() - start
    text = (tmp_path / "said.txt").read_text()
    assert code != 0
    assert took < 30
    assert "SIGKILL" in text or "Signal 9" in text
    assert "rank      : 1" in text
    assert last(tmp_path)["global_step"] > 0


def rank_once_trained(launcher: int, folder: Path, rank: int) -> int:
    """The process of a rank, when the first epoch has ended."""
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline, (folder / "said.txt").read_text()
        time.sleep(0.2)
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {
        int(child): dict(entry.split("=", 1) for entry in environment_of(child) if "=" in entry).get("RANK")
        for child in children
    }
    return next(child for child, its in ranks.items() if its == str(rank))


def environment_of(process: str) -> list[str]:
    return Path(f"/proc/{process}/environ").read_text().split("\0")
