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
