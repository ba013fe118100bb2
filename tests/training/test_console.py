import logging
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
from torch.utils.data import DataLoader

from repblocks.errors import DataError
from repblocks.training.console import quiet_lightning, readable_errors, stoppable


def test_an_error_of_ours_is_one_block_and_a_failing_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as stopped, readable_errors():
        raise DataError("no images in [photos]; set data.root")
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert "DataError" in shown
    assert "no images in [photos]; set data.root" in shown
    assert "Traceback" not in shown


def test_developers_get_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(DataError), readable_errors():
        raise DataError("no images")


def test_other_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), readable_errors():
        raise ZeroDivisionError


def test_an_error_of_a_worker_process_is_shown_without_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    loader: DataLoader[Any] = DataLoader(cast("Any", Unreadable()), num_workers=1)
    with pytest.raises(SystemExit), readable_errors():
        next(iter(loader))
    shown = capsys.readouterr().err
    assert "a.png cannot be read; remove it" in shown
    assert "Traceback" not in shown
    assert "worker process" not in shown


class Unreadable:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise DataError("a.png cannot be read; remove it")


def test_in_a_sweep_the_error_is_shown_and_goes_on_to_hydra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr("repblocks.training.console.is_sweep", lambda: True)
    with pytest.raises(DataError), readable_errors():
        raise DataError("no images in photos")
    assert "no images in photos" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["checkpoint", "nothing"])
@pytest.mark.parametrize(("code", "word"), [(130, "interrupted"), (143, "terminated")])
def test_a_stopped_run_says_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written: str, code: int, word: str
) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    if written == "checkpoint":
        last.parent.mkdir()
        last.touch()
    with pytest.raises(SystemExit) as stopped, stoppable(tmp_path):
        raise SystemExit(code)
    assert stopped.value.code == code
    resumed = f"go on with: python train.py resume=auto hydra.run.dir={tmp_path}"
    assert f"{word}; {resumed if written == 'checkpoint' else 'no checkpoint was'}" in capsys.readouterr().err


def test_other_exits_keep_their_code(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped, stoppable(tmp_path):
        raise SystemExit(3)
    assert stopped.value.code == 3


def test_advertisements_are_dropped_and_other_messages_stay() -> None:
    quiet_lightning()
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    tip, news = (
        logging.makeLogRecord({"msg": message})
        for message in ("💡 Tip: For seamless cloud uploads and versioning, try", "something happened")
    )
    assert not logger.filter(tip)
    assert logger.filter(news)


def test_only_the_listed_warnings_are_silent() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_lightning()
        warnings.warn("The 'train_dataloader' does not have many workers which", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["something else"]
