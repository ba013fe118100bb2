"""Train, collapse, verify and export an image classifier: ``python train.py --help``."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> float | None:
    """Run the composed configuration in Hydra's run folder; give what a sweeper minimises: the validation error."""
    # Imported here so that --help and typing errors do not wait for torch.
    from repblocks.training import readable_errors, run

    with readable_errors():
        settings = OmegaConf.to_container(config, resolve=True)
        assert isinstance(settings, dict)
        named = {str(group): values for group, values in settings.items()}
        summary = run(named, Path(HydraConfig.get().runtime.output_dir))
    return None if summary is None else 1 - summary.details["checkpoint"]["val_accuracy"]


if __name__ == "__main__":
    main()
