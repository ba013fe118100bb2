import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from repblocks.errors import ConfigurationError
from repblocks.training.checkpoints.callback import RunCheckpoints
from repblocks.training.trainer import make_loggers, make_trainer

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def sweeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """As inside a job of ``--multirun``."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        sweep = compose("train", ["hydra.mode=MULTIRUN"], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", sweep)


class TestTrainer:
    def test_it_writes_checkpoints_as_configured(self, tiny: Any, tmp_path: Path) -> None:
        callback = make_trainer(tiny("checkpoint.keep=7", "checkpoint.every_steps=5"), tmp_path).checkpoint_callback
        assert isinstance(callback, RunCheckpoints)
        assert (callback.folder, callback.keep, callback.every_steps) == (tmp_path / "checkpoints", 7, 5)

    def test_validation_within_epochs_is_refused(self, tiny: Any, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"trainer\.val_check_interval=0\.5 .*leave it out"):
            make_trainer(tiny("+trainer.val_check_interval=0.5"), tmp_path)

    @pytest.mark.usefixtures("sweeping")
    def test_processes_of_torchrun_may_sweep(
        self, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
        for key, value in {**torchrun, "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
            monkeypatch.setenv(key, value)
        config = configure("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
        assert make_trainer(config, tmp_path).world_size == 2

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_hardware_that_is_not_there_is_a_configuration_error(self, configure: Any, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"the trainer refuses its settings: .*(GPU|gpu)"):
            make_trainer(configure("trainer=gpu"), tmp_path)

    @pytest.mark.parametrize("wrong", ["+trainer.max_stepps=3", "trainer.precision=17", "trainer.strategy=dpd"])
    def test_what_lightning_refuses_is_a_configuration_error(self, tiny: Any, tmp_path: Path, wrong: str) -> None:
        with pytest.raises(ConfigurationError, match=r"the trainer refuses its settings: .*configs/trainer/"):
            make_trainer(tiny(wrong), tmp_path)

    @pytest.mark.parametrize(
        "wrong",
        [f"trainer.limit_{part}_batches=0" for part in ("train", "val")] + ["+trainer.check_val_every_n_epoch=2"],
    )
    def test_validation_must_run_because_it_chooses_the_checkpoint(self, tiny: Any, tmp_path: Path, wrong: str) -> None:
        with pytest.raises(ConfigurationError, match="validation would never run"):
            make_trainer(tiny(wrong), tmp_path)

    @pytest.mark.parametrize("epochs", ["0", "-1", "null", "abc", "1.5"])
    def test_no_or_strange_epochs_are_refused(self, tiny: Any, tmp_path: Path, epochs: str) -> None:
        with pytest.raises(ConfigurationError, match=r"trainer\.max_epochs=\S+ needs to be at least 1 and a whole"):
            make_trainer(tiny(f"trainer.max_epochs={epochs}"), tmp_path)

    @pytest.mark.parametrize("cut", ["fast_dev_run=true", "fast_dev_run=2", "max_steps=3", "max_time=00:00:01:00"])
    def test_ends_within_an_epoch_are_refused_before_training(self, tiny: Any, tmp_path: Path, cut: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"trainer\.{cut.partition('=')[0]}=.*use trainer\.max_epochs=1"):
            make_trainer(tiny(f"+trainer.{cut}"), tmp_path)

    @pytest.mark.parametrize("off", ["fast_dev_run=false", "max_steps=-1", "max_time=null"])
    def test_those_ends_may_be_switched_off(self, tiny: Any, tmp_path: Path, off: str) -> None:
        assert make_trainer(tiny(f"+trainer.{off}"), tmp_path).max_epochs == 1

    @pytest.mark.usefixtures("sweeping")
    def test_a_sweep_does_not_start_processes_that_would_sweep_again(self, configure: Any, tmp_path: Path) -> None:
        make_trainer(configure("trainer=cpu"), tmp_path)
        with pytest.raises(ConfigurationError, match="torchrun"):
            make_trainer(configure("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"), tmp_path)


class TestLoggers:
    def test_metrics_go_to_the_run_folder(self, configure: Any, tmp_path: Path) -> None:
        (logger,) = make_loggers(configure()["logger"], tmp_path)
        assert Path(str(logger.log_dir)) == tmp_path

    def test_tensorboard_comes_beside_the_metrics(self, configure: Any, tmp_path: Path) -> None:
        _, logger = make_loggers(configure("logger=tensorboard")["logger"], tmp_path)
        assert Path(str(logger.log_dir)) == tmp_path / "tensorboard"

    def test_tensorboard_without_its_package_names_the_extra(
        self, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for package in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
            monkeypatch.setattr(sys.modules["lightning_fabric.loggers.tensorboard"], package, False)
        with pytest.raises(ConfigurationError, match=r'pip install "repblocks\[tensorboard\]"'):
            make_loggers(configure("logger=tensorboard")["logger"], tmp_path)

    def test_an_unknown_logger_names_the_others(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"logger\.name=tensorbord is unknown.*tensorboard"):
            make_loggers({"name": "tensorbord"}, tmp_path)
