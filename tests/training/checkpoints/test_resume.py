import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from support import loaded_script

from repblocks.errors import ConfigurationError
from repblocks.training import run
from repblocks.training.checkpoints import resume
from repblocks.training.checkpoints.files import newest_intact, steps_written
from repblocks.training.checkpoints.resume import settled

CONFIGS = Path(__file__).parents[3] / "configs"
DRILL = loaded_script(Path(__file__).parents[3] / "scripts" / "fault_drill.py")
differing = DRILL.differing
outcome = DRILL.outcome


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(finished_run, tmp_path / "run", symlinks=True)


@pytest.fixture
def hydra(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What train.py is inside of: Hydra with the overrides of a command line."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):

        def command(*overrides: str) -> dict[str, Any]:
            config = compose("train", [*overrides], return_hydra_config=True)
            with open_dict(config):
                config.hydra.overrides.task = list(overrides)
            monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
            return dict(resume._composed(overrides))

        yield command


def started(hydra: Any, folder: Path, *overrides: str) -> None:
    config = hydra(*overrides)
    resume.record(config, folder)


class TestConfiguration:
    def test_a_new_run_is_recorded_with_its_command_line(self, hydra: Any, tmp_path: Path) -> None:
        started(hydra, tmp_path, "resume=auto", "optimizer.lr=0.5", "data=cifar10")
        record = yaml.safe_load((tmp_path / "run.yaml").read_text())
        assert record["overrides"] == ["optimizer.lr=0.5", "data=cifar10"]
        assert record["config"]["optimizer"]["lr"] == 0.5
        assert record["config"]["data"]["name"] == "cifar10"

    def test_without_further_overrides_it_is_the_runs_own(self, hydra: Any, tmp_path: Path) -> None:
        started(hydra, tmp_path, "optimizer.lr=0.5", "seed=7")
        config = settled(hydra("resume=auto"), tmp_path)
        assert (config["optimizer"]["lr"], config["seed"], config["resume"]) == (0.5, 7, "auto")

    def test_the_record_counts_even_where_the_configs_have_changed_since(self, hydra: Any, tmp_path: Path) -> None:
        started(hydra, tmp_path, "seed=7")
        record = yaml.safe_load((tmp_path / "run.yaml").read_text())
        record["config"]["optimizer"]["lr"] = 0.125
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(record))
        assert settled(hydra("resume=auto", "data.workers=1"), tmp_path)["optimizer"]["lr"] == 0.125

    def test_repeating_what_the_run_has_is_no_conflict(self, hydra: Any, tmp_path: Path) -> None:
        started(hydra, tmp_path, "optimizer.lr=0.5", "data=cifar10", "data.batch_size=32")
        config = settled(hydra("resume=auto", "data=cifar10", "optimizer.lr=0.5"), tmp_path)
        assert (config["data"]["batch_size"], config["optimizer"]["lr"]) == (32, 0.5)

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("optimizer.lr=0.25", r"optimizer\.lr=0\.25 \(the run has 0\.5\)"),
            ("trainer.max_epochs=99", r"trainer\.max_epochs=99 \(the run has 16\)"),
            ("data=cifar100", r"data\.name=cifar100 \(the run has digits\)"),
            ("+model.args.drop_rate=0.1", r"model\.args\.drop_rate=0\.1 \(the run has nothing there\)"),
            ("seed=8", r"seed=8 \(the run has 7\)"),
        ],
    )
    def test_a_conflict_is_an_error_with_both_values(
        self, hydra: Any, tmp_path: Path, override: str, words: str
    ) -> None:
        started(hydra, tmp_path, "optimizer.lr=0.5", "seed=7")
        with pytest.raises(ConfigurationError, match=words):
            settled(hydra("resume=auto", override), tmp_path)

    def test_where_and_on_what_it_runs_may_change(self, hydra: Any, tmp_path: Path) -> None:
        started(hydra, tmp_path, "optimizer.lr=0.5")
        moved = ("trainer=ddp", "trainer.devices=2", "data.workers=3", "logger=tensorboard", "export.formats=[]")
        config = settled(hydra("resume=auto", *moved), tmp_path)
        assert (config["trainer"]["strategy"], config["trainer"]["devices"]) == ("ddp", 2)
        assert (config["data"]["workers"], config["logger"]["name"], config["export"]["formats"]) == (
            3,
            "tensorboard",
            [],
        )
        assert config["optimizer"]["lr"] == 0.5

    def test_a_run_is_not_overwritten_by_another(self, hydra: Any, tmp_path: Path) -> None:
        started(hydra, tmp_path)
        with pytest.raises(ConfigurationError, match=r"holds a run already; go on with it: .*resume=auto"):
            settled(hydra(), tmp_path)

    def test_a_folder_without_a_run_starts_one(self, hydra: Any, tmp_path: Path) -> None:
        config = hydra("resume=auto", "seed=3")
        assert settled(config, tmp_path) == config

    def test_other_words_than_auto_are_refused(self, hydra: Any, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"resume=yes is unknown.*auto"):
            settled(hydra("resume=yes"), tmp_path)

    def test_callers_without_a_command_line_are_held_to_the_same(self, tiny: Any, folder: Path) -> None:
        assert settled(tiny("resume=auto", "data.workers=1"), folder)["data"]["workers"] == 1
        with pytest.raises(ConfigurationError, match=r"optimizer\.lr=0\.25"):
            settled(tiny("resume=auto", "optimizer.lr=0.25"), folder)


def test_a_finished_run_that_goes_on_gives_the_same_again(tiny: Any, finished_run: Path, folder: Path) -> None:
    shutil.rmtree(folder / "deploy")
    run(tiny("resume=auto"), folder)
    assert not differing(outcome(finished_run), outcome(folder))


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(tiny: Any, tmp_path: Path) -> None:
    config = tiny("trainer.max_epochs=3", "data.workers=0")
    run(config, tmp_path / "undisturbed")
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "damaged", symlinks=True)
    newest = steps_written(tmp_path / "damaged" / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=rf"{newest.name} is truncated .*; the one before is used"):
        run({**config, "resume": "auto"}, tmp_path / "damaged")
    assert not differing(outcome(tmp_path / "undisturbed"), outcome(tmp_path / "damaged"))
    assert newest_intact(tmp_path / "damaged" / "checkpoints") == (newest, [])


def test_a_run_without_a_checkpoint_starts_from_its_record(tiny: Any, tmp_path: Path, folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    run(tiny("resume=auto"), folder)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
