import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repblocks.training.checkpoints.files import newest_intact

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

pytestmark = pytest.mark.slow


def test_runs_that_are_killed_at_20_moments_end_as_if_they_had_not_been() -> None:
    command = [sys.executable, "scripts/fault_drill.py", "--kills", "20", "--seed", "1"]
    drill = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=360)
    assert drill.returncode == 0, drill.stdout + drill.stderr
    assert drill.stdout.endswith("survived 20/20\n")
    assert len(re.findall(r"killed \d+ ms after batch \d+: the same outcome", drill.stdout)) == 10
    for point in ("before write", "half-written", "before rename", "after rename"):
        assert f"killed {point}" in drill.stdout


def test_a_process_that_is_terminated_writes_a_checkpoint_within_ten_seconds_and_leaves_with_143(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "train.py", f"hydra.run.dir={tmp_path}", "trainer=cpu", "trainer.max_epochs=9999"]
    with (tmp_path / "said.txt").open("w") as said:
        run = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=said, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while "epoch   1/" not in (tmp_path / "said.txt").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            time.sleep(0.3)
            start = time.monotonic()
            run.send_signal(signal.SIGTERM)
            code = run.wait(timeout=60)
        finally:
            run.kill()
    assert code == 143
    assert time.monotonic() - start < 10
    newest, damaged = newest_intact(tmp_path / "checkpoints")
    assert newest is not None
    assert not damaged
    assert (
        f"terminated; go on with: python train.py resume=auto hydra.run.dir={tmp_path}"
        in (tmp_path / "said.txt").read_text()
    )
