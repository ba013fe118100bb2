"""Sweeps on a cluster and searches, started as users start them; SLURM is played by scripts on this machine."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parents[2]
TINY = (
    "+model.args.depths=[1,1,1]",
    "+model.args.widths=[8,8,8]",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "export.formats=[safetensors]",
)

# What submitit and Lightning use of SLURM: the job's script is run at once, on one node.
SBATCH = """
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
tasks = re.search(r"--ntasks-per-node=(\\d+)", script)[1]
job = {"NTASKS": tasks, "NTASKS_PER_NODE": tasks, "NNODES": "1", "JOB_NUM_NODES": "1", "NODEID": "0"}
job |= {"JOB_ID": str(os.getpid()), "JOB_NAME": "train", "NODELIST": "localhost", "JOB_NODELIST": "localhost"}
environment = os.environ | {f"SLURM_{key}": value for key, value in job.items()}
with open("slurm.log", "w") as log:
    subprocess.Popen(["bash", sys.argv[-1]], env=environment, stdout=log, stderr=log)
print("Submitted batch job", os.getpid())
"""
SRUN = """
import os, subprocess, sys
command = sys.argv[sys.argv.index("-u") - 1 :]
ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(int(os.environ["SLURM_NTASKS"]))]
tasks = [subprocess.Popen(command, env=os.environ | rank) for rank in ranks]
sys.exit(max(task.wait() for task in tasks))
"""
SACCT = """
print("JobID|State")
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder of programs with the names of SLURM's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, source in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT), ("scontrol", SACCT)):
        (folder / name).write_text(f"#!{sys.executable}\n{source}")
        (folder / name).chmod(0o755)
    return folder


def sweep(folder: Path, *arguments: str, path: str = "") -> Path:
    """Run ``train.py --multirun`` in a folder; gives that of the sweep."""
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1"}
    command = [sys.executable, str(ROOT / "train.py"), "--multirun", *TINY, *arguments, "hydra.sweep.dir=sweep"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    log = folder / "slurm.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    return folder / "sweep"


def hydra_config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", [*overrides], return_hydra_config=True).hydra


def test_a_slurm_job_asks_for_what_the_trainer_needs():
    launcher = hydra_config("hydra/launcher=slurm", "trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2").launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 4, 4)
    plugin = OmegaConf.to_container(hydra_config("hydra/launcher=submitit_slurm").launcher, resolve=False)
    ours = OmegaConf.to_container(hydra_config("hydra/launcher=slurm").launcher, resolve=False)
    assert {key for key in ours if ours[key] != plugin[key]} == {"nodes", "tasks_per_node", "gpus_per_node"}


@pytest.mark.slow
def test_the_tasks_of_a_slurm_job_train_as_one_run(tmp_path: Path, cluster: Path):
    distributed = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "hydra.launcher.gpus_per_node=null")
    folder = sweep(tmp_path, "hydra/launcher=slurm", *distributed, path=str(cluster))
    (script,) = folder.glob(".submitit/*/*.sh")
    assert "#SBATCH --ntasks-per-node=2\n" in script.read_text()
    assert "#SBATCH --nodes=1\n" in script.read_text()
    assert "2 cpu processes" in (tmp_path / "slurm.log").read_text()
    assert {path.name for path in folder.iterdir()} == {".submitit", "0", "multirun.yaml"}
    with (folder / "0" / "metrics.csv").open() as rows:
        assert len([row for row in csv.DictReader(rows) if row["val/accuracy"]]) == 1
    assert json.loads((folder / "0" / "summary.json").read_text())["equivalence"]["passed"]
    assert (folder / "0" / "deploy" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_search_keeps_the_run_that_validates_best(tmp_path: Path):
    search = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1")
    rates = "optimizer.lr=choice(1e-9,1e-2)"
    folder = sweep(tmp_path, *search, rates, "hydra.sweeper.sampler.seed=1", "trainer.limit_train_batches=12")
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*/summary.json"))]
    errors = [1 - run["checkpoint"]["val_accuracy"] for run in runs]
    assert len(errors) == 3
    assert max(errors) > min(errors)
    best = OmegaConf.load(folder / "optimization_results.yaml")
    assert best.best_value == pytest.approx(min(errors))
    assert best.best_params["optimizer.lr"] == 1e-2
