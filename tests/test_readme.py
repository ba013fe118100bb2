"""Every Python block of the README runs, in order, in one namespace: what it shows is true."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import repblocks as rb

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.slow
def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), namespace)
    assert len(BLOCKS) >= 4
    assert (tmp_path / "deploy" / "model.onnx").is_file()


def test_every_block_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)`", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert dict(rows) == {name: block.__name__ for name, block in rb.BLOCKS.items()}


def test_every_file_that_the_readme_names_exists():
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:scripts|configs|repblocks|tests)/[\w/.]*\w", text)) | {"train.py"}
    missing = [name for name in named if not (README.parent / name).exists()]
    assert named
    assert not missing


@pytest.mark.slow
def test_the_table_of_models_is_what_its_command_prints(monkeypatch, capsys):
    script = README.parent / "scripts" / "list_models.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("| `rb_") == len(rb.list_models())
    assert printed in README.read_text(encoding="utf-8")
