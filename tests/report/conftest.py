import warnings
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from report.report_cases import small_model, small_repnext

from repblocks.report.facts import Facts, gather
from repblocks.report.page import render

CONFIGS = Path(__file__).parents[2] / "configs"
OVERRIDES = (
    "+model.args.depths=[1,1,1]",
    "+model.args.widths=[8,8,8]",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=2",
    "export.formats=[safetensors]",
    "branch_shares=true",
)


@pytest.fixture(scope="session")
def facts() -> Facts:
    return gather(small_model())


@pytest.fixture(scope="session")
def repnext_facts() -> Facts:
    return gather(small_repnext())


@pytest.fixture(scope="session")
def page(facts: Facts) -> str:
    return render(facts)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of train.py that has ended; not to be changed."""
    from repblocks.training import run
    from repblocks.training.console import quiet_lightning

    folder = tmp_path_factory.mktemp("runs") / "finished"
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", [*OVERRIDES]), resolve=True)
    assert isinstance(config, dict)
    with warnings.catch_warnings():
        quiet_lightning()
        run({str(key): value for key, value in config.items()}, folder)
    return folder
