import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from repblocks.training import run
from repblocks.training.console import quiet_lightning

CONFIGS = Path(__file__).parents[2] / "configs"
TINY_RUN = ("trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "export.formats=[safetensors]")

Configure = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What a run silences for its users is silent here too; every other warning is an error."""
    with warnings.catch_warnings():
        quiet_lightning()
        yield


@pytest.fixture(scope="session")
def configure() -> Configure:
    """The configuration that train.py would get for these overrides, as plain values."""

    def composed(*overrides: str) -> dict[str, Any]:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            values = OmegaConf.to_container(compose("train", [*overrides]), resolve=True)
        assert isinstance(values, dict)
        return {str(key): value for key, value in values.items()}

    return composed


@pytest.fixture(scope="session")
def tiny(configure: Configure) -> Configure:
    """As ``configure``, with a model and a run of a second."""
    return lambda *overrides: configure(
        "+model.args.depths=[1,1,1]", "+model.args.widths=[8,8,8]", *TINY_RUN, *overrides
    )


@pytest.fixture(scope="session")
def finished_run(tiny: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run that has ended; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with warnings.catch_warnings():
        run(tiny(), folder)
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of small colour images of several sizes in train/, val/ and test/."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{i}.png")
    return root
