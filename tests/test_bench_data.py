"""The command that compares CIFAR's fast path with the per-image pipeline."""

from pathlib import Path
from types import ModuleType

import pytest
from support import loaded_script

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_data.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return loaded_script(SCRIPT)


def test_the_fast_path_is_at_least_three_times_as_fast(bench: ModuleType) -> None:
    rates = bench.measured(bench.pipelines(1280, 128), 1280, rounds=2)
    assert set(rates) == {"in memory", "torchvision, 0 workers", "torchvision, 2 workers"}
    assert rates.pop("in memory") >= 3 * max(rates.values())


def test_it_prints_the_ratios(bench: ModuleType) -> None:
    lines = bench.compared(300, 64, 1)
    assert len(lines) == 5
    assert "in memory" in lines[1]
    assert "needed: 3" in lines[-1]
