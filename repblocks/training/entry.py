"""What train.py and ``repblocks train`` do: Hydra composes a configuration, and that is run."""

from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from repblocks.training.console import readable_errors
from repblocks.training.pipeline import run
from repblocks.training.summary import Summary


def configs() -> Path:
    """The folder of the configuration groups: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def summary_of(config: DictConfig) -> Summary | None:
    """Run a composed configuration in Hydra's run folder."""
    with readable_errors():
        settings = OmegaConf.to_container(config, resolve=True)
        assert isinstance(settings, dict)
        named = {str(group): values for group, values in settings.items()}
        return run(named, Path(HydraConfig.get().runtime.output_dir))


def run_composed(config: DictConfig) -> float | None:
    """Run a composed configuration; give what a sweeper minimises: the validation error."""
    return validation_error(summary_of(config))


def validation_error(summary: Summary | None) -> float | None:
    """Of the best checkpoint; None on the processes that are not the first."""
    return None if summary is None else 1 - summary.details["checkpoint"]["val_accuracy"]


def main(task: Callable[[DictConfig], float | None] = run_composed) -> None:
    """Let Hydra compose the configuration that the process's arguments describe, and give it to a task."""
    hydra.main(version_base="1.3", config_path=str(configs()), config_name="train")(task)()
