"""The command behind the README's table of collapsed models."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_collapse.py"


def printed(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_row_says_what_is_left_of_a_model_and_how_fast_that_is() -> None:
    head, rule, row = printed("test_resnet", "--sections", "table", "--repeats", "1").splitlines()
    cells = row.strip("| ").split(" | ")
    assert len(cells) == head.strip("| ").count(" | ") + 1 == rule.count("---")
    assert cells[0] == "`test_resnet`"
    assert re.fullmatch(r"\d+ -> 0", cells[2])
    assert float(cells[5]) <= 1e-11
    assert all(float(cell.split()[0]) > 0 for cell in cells[6:])


@pytest.mark.slow
def test_the_time_of_a_collapse_is_put_beside_that_of_a_trace_and_a_copy() -> None:
    said = printed("resnet18", "--sections", "speed", "--repeats", "1")
    assert re.search(r"resnet18 +\d+\.\d\d s, \d+\.\d\d times trace \+ copy \(allowed: 3 times\)", said)
