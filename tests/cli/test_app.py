import subprocess
import sys
from typing import Any

import pytest

COMMANDS = {
    *("list", "describe", "train", "export", "collapse", "validate", "verify", "predict", "benchmark", "report"),
    "convert",
}


def test_help_names_every_command(command: Any) -> None:
    said = command("--help")
    assert said.code == 0
    assert all(f" {name} " in said.out for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS - {"train"}))
def test_every_command_explains_itself_and_gives_json(command: Any, name: str) -> None:
    said = command(name, "--help")
    assert said.code == 0
    assert "--json" in said.out


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "repblocks", "list", "rb_repvgg_cifar"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "rb_repvgg_cifar" in done.stdout


def test_an_unknown_option_is_a_wrong_call(command: Any) -> None:
    assert command("list", "--wrong").code == 2


def test_an_error_is_one_block_and_a_failing_code(command: Any) -> None:
    said = command("describe", "rb_repvgg_cifra")
    assert said.code == 1
    assert "ConfigurationError" in said.err
    assert "rb_repvgg_cifar" in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_developers_get_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from repblocks.cli import main
    from repblocks.errors import ConfigurationError

    monkeypatch.setenv("REPBLOCKS_FULL_ERROR", "1")
    with pytest.raises(ConfigurationError):
        main(["describe", "nothing"])


def test_an_error_that_nobody_foresaw_is_a_block_that_says_how_to_see_more(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = command("collapse", "rb_repvgg_cifar", "--size", "1x32x32")
    assert said.code == 1
    assert "Traceback" not in said.err
    monkeypatch.setattr("repblocks.cli.models.list_models", lambda pattern: 1 / 0)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    said = command("list")
    assert said.code == 1
    assert "ZeroDivisionError" in said.err
    assert "REPBLOCKS_FULL_ERROR=1" in said.err


def test_a_full_disk_is_one_block(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("repblocks.benchmark.draw", full)
    options = ("--runtimes", "eager", "--repeats", "1", "--size", "3x32x32", "--plot", tmp_path / "plot.png")
    said = command("benchmark", "rb_repvgg_cifar", *options)
    assert said.code == 1
    assert "No space left" in said.err
    assert "REPBLOCKS_FULL_ERROR" not in said.err
