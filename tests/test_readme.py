"""Every Python block of the README runs, in order, in one namespace: what it shows is true."""

import re
from pathlib import Path

import pytest
import torch

import repblocks as rb
from repblocks.cli import main

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.slow
def test_every_python_block_runs_and_prints_what_is_shown_behind_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    for block, shown in BLOCKS:
        capsys.readouterr()
        exec(compile(block, str(README), "exec"), namespace)
        printed = capsys.readouterr().out
        assert not shown or without_numbers(shown) == without_numbers(printed)
    assert sum(bool(shown) for _, shown in BLOCKS) >= 8
    assert (tmp_path / "deploy" / "model.onnx").is_file()


def without_numbers(text):
    """Rounding and random weights decide the digits; how many there are, and with them the spaces, follow."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*(e[-+]\d+)?", "#", text)).strip()


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
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main(["list"])
    printed = capsys.readouterr().out
    assert printed.count("rb_") == len(rb.list_models())
    assert printed in README.read_text(encoding="utf-8")


def test_every_link_within_leads_to_a_heading():
    text = README.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert len(links) >= 10
    assert links <= anchors
