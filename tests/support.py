"""What several tests share."""

import importlib.util
from pathlib import Path
from types import ModuleType

from repblocks.calibration import batch_norms, calibrate, randomise

# The name that most tests know it by.
randomise_batch_norms = randomise

__all__ = ["batch_norms", "calibrate", "loaded_script", "randomise_batch_norms"]


def loaded_script(path: Path) -> ModuleType:
    """A script as a module, by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
