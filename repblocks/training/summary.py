"""The outcome of a run: both forms measured, compared, and written to ``summary.json``."""

import json
import platform
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from repblocks.profiling import latency_ms, profile
from repblocks.training.data import ImageData
from repblocks.training.evaluation import accuracy
from repblocks.verification import EquivalenceReport


@dataclass(frozen=True, kw_only=True)
class FormResult:
    """One form of a model, measured.

    Attributes:
        test_accuracy: Fraction of the test images.
        params: Learned numbers.
        macs: Multiply-accumulates for one image.
        weight_bytes: Parameters and buffers.
        latency_ms: Median for one image on one CPU thread; only ratios within one run mean something.
    """

    test_accuracy: float
    params: int
    macs: int
    weight_bytes: int
    latency_ms: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run or a validation found out."""

    model: str
    data: str
    forms: Mapping[str, FormResult]
    equivalence: EquivalenceReport | None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; each form under its name."""
        return {
            "model": self.model,
            "data": self.data,
            **{name: asdict(form) for name, form in self.forms.items()},
            "equivalence": None if self.equivalence is None else self.equivalence.to_dict(),
            **self.details,
        }

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")


def measure(forms: Mapping[str, nn.Module], data: ImageData, device: Any = "cpu") -> dict[str, FormResult]:
    """Test accuracy on ``device``; parameters, MACs and interleaved latency on the CPU, where the models end up.

    Args:
        forms: Models in eval mode by form.
        data: Its test images are used.
        device: Where accuracy is computed.
    """
    loader, classes = data.test_dataloader(), len(data.class_names)
    right = {
        name: accuracy(model.to(device), loader, classes=classes, what=f"testing the {name} form")
        for name, model in forms.items()
    }
    profiles = {name: profile(model.cpu(), data.preprocessing.input_size) for name, model in forms.items()}
    latencies = latency_ms(forms, data.test_images(1))
    return {
        name: FormResult(test_accuracy=right[name], latency_ms=latencies[name], **profiles[name].to_dict())
        for name in forms
    }


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    packages = ("repblocks", "torch", "timm", "pytorch-lightning", "torchvision", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


class Stopwatch:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Generator[None]:
        """Time the block as ``stage``."""
        start = perf_counter()
        yield
        self.seconds[stage] = round(perf_counter() - start, 2)
