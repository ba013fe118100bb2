"""Train, collapse, verify and export an image classifier: ``python train.py --help``."""

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> float | None:
    """Run the composed configuration in Hydra's run folder; give what a sweeper minimises: the validation error."""
    # Imported here so that --help and typing errors do not wait for torch.
    from repblocks.training.entry import run_composed

    return run_composed(config)


if __name__ == "__main__":
    main()
