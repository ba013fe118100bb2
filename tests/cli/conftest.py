import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import repblocks as rb
from repblocks.calibration import randomise
from repblocks.cli import main


@dataclass
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Run ``repblocks ARGUMENTS`` in this process."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rb.save with a small network in train form, for digits."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"depths": [1, 1, 1], "widths": [8, 8, 8], "num_classes": 10, "in_chans": 1}
    model: Any = rb.create_model("rb_repvgg_cifar", **small)
    randomise(model, torch.Generator().manual_seed(0))
    config = {**model.pretrained_cfg, "label_names": [str(digit) for digit in range(10)], "crop_pct": 1.0}
    model.pretrained_cfg = model.default_cfg = config
    path = tmp_path_factory.mktemp("models") / "small.safetensors"
    rb.save(model.eval(), path)
    return path
