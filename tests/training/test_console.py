import logging
import warnings

import pytest

from repblocks.errors import DataError
from repblocks.training.console import quiet_lightning, readable_errors


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
