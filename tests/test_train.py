import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repblocks.checkpoint import load
from repblocks.training import model_from_checkpoint
from repblocks.training.shares import shares_of

ROOT = Path(__file__).parent.parent


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run train.py as a user would, in ``folder``."""
    environment = {**os.environ, "COLUMNS": "200"}
    environment.pop("HYDRA_FULL_ERROR", None)
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
def test_train_ends_with_a_table_and_deploy_files(tmp_path: Path) -> None:
    model = ("+model.args.depths=[1,1,1]", "+model.args.widths=[8,8,8]")
    done = train(tmp_path, *model, "trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.accelerator=cpu")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "digits-rb_repvgg_cifar").iterdir()
    assert {path.name for path in (run / "deploy").iterdir()} == {"model.safetensors", "model.onnx", "deploy.json"}
    assert load(run / "deploy" / "model.safetensors").training is False
    assert json.loads((run / "summary.json").read_text())["equivalence"]["passed"]
    for words in (
        "epoch   1/1",
        "test accuracy",
        "largest output difference",
        f"runs/{run.parent.name}/{run.name}/deploy/model.onnx",
    ):
        assert words in done.stdout
    assert "Warning" not in done.stderr
    assert "Tip:" not in done.stderr


@pytest.mark.slow
def test_an_error_is_one_block_with_a_failing_exit_code(tmp_path: Path) -> None:
    done = train(tmp_path, "model.name=rb_repvgg_cifra")
    assert done.returncode == 1
    assert "ConfigurationError" in done.stderr
    assert "rb_repvgg_cifar" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_sweep_runs_the_jobs_after_one_that_fails(tmp_path: Path) -> None:
    brief = ("+model.args.depths=[1,1,1]", "+model.args.widths=[8,8,8]", "trainer=cpu", "trainer.max_epochs=1")
    done = train(
        tmp_path, "--multirun", *brief, "trainer.limit_train_batches=2", "export.formats=[]", "optimizer.lr=x,0.001"
    )
    assert done.returncode == 1
    assert "ConfigurationError" in done.stderr
    assert len(list(tmp_path.rglob("summary.json"))) == 1


@pytest.mark.slow
def test_two_processes_end_as_one_does_and_log_the_shares_of_the_first(tmp_path: Path) -> None:
    model = (
        "+model.args.depths=[1,1,1]",
        "+model.args.widths=[8,8,8]",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
    )
    brief = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "export.formats=[]", "branch_shares=true")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(ROOT / "train.py"), *model, *brief, "hydra.run.dir=run"]
    with (tmp_path / "said.txt").open("w") as said:
        done = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said, start_new_session=True)
        try:
            assert done.wait(timeout=240) == 0, (tmp_path / "said.txt").read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(done.pid, signal.SIGKILL)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        logged = next(row for row in csv.DictReader(file) if row["share/stem.conv/kxk"])
    trained = shares_of(model_from_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    assert {key: float(logged[key]) for key in trained} == pytest.approx(trained, rel=1e-6)


def test_help_explains_groups_and_shows_examples(tmp_path: Path) -> None:
    done = train(tmp_path, "--help")
    assert done.returncode == 0
    for words in (
        "parallel branches",
        "python train.py experiment=cifar10_repvgg",
        "data: cifar10, cifar100, digits, imagefolder, imagenet, timm, wds",
        "experiment: cifar100_repvgg, cifar10_acnet_resnet56",
        "trainer: auto, cpu, ddp, gpu",
        "max_epochs:",
    ):
        assert words in done.stdout


def test_a_mistyped_key_or_group_is_named_without_a_traceback(tmp_path: Path) -> None:
    for wrong, words in (("trainer.max_epoch=3", "max_epoch"), ("data=cifar", "Available options in 'data'")):
        done = train(tmp_path, wrong)
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr
