import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import loaded_script

from repblocks.checkpoint import load
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.training import run
from repblocks.training.checkpoints.callback import RunCheckpoints
from repblocks.training.checkpoints.files import newest_intact, read_checkpoint, steps_written
from repblocks.training.checkpoints.restore import model_from_checkpoint
from repblocks.training.task import ClassificationTask
from repblocks.verification import verify

DRILL = loaded_script(Path(__file__).parents[3] / "scripts" / "fault_drill.py")
differing = DRILL.differing
outcome = DRILL.outcome

Hook = Callable[..., Any]


def names(folder: Path) -> list[str]:
    return [path.name for path in steps_written(folder / "checkpoints")]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Signals do in other tests what they did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def stateful(configure: Any) -> dict[str, Any]:
    """The configuration of the fault drill, without worker processes."""
    return configure(*DRILL.RUN, "data.workers=0")


@pytest.fixture(scope="session")
def undisturbed(stateful: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(stateful, folder)
    return folder


def signalled(monkeypatch: pytest.MonkeyPatch, hook: str, number: signal.Signals, when: Callable[..., bool]) -> None:
    """Send a signal to this process the first time that ``when`` holds in a hook of the task."""
    original, sent = getattr(ClassificationTask, hook), []

    def sending(task: ClassificationTask, *arguments: Any) -> Any:
        if not sent and not task.trainer.sanity_checking and when(task, *arguments):
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(task, *arguments)

    monkeypatch.setattr(ClassificationTask, hook, sending)


PLACES: dict[str, tuple[str, Callable[..., bool], str]] = {
    "within an epoch": (
        "training_step",
        lambda task, batch, i: (task.current_epoch, i) == (1, 2),
        "step-00000009.ckpt",
    ),
    "in the last batch": ("training_step", lambda task, batch, i: (task.current_epoch, i) == (1, 5), "unvalidated"),
    "in validation": ("validation_step", lambda task, batch, i: (task.current_epoch, i) == (1, 1), "unvalidated"),
    "at the end of validation": (
        "on_validation_epoch_end",
        lambda task: task.current_epoch == 1,
        "step-00000012.ckpt",
    ),
    "in the last validation": ("validation_step", lambda task, batch, i: task.current_epoch == 2, "unvalidated"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_terminated_goes_on_as_if_it_had_not_been(
    stateful: dict[str, Any], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    hook, when, written = PLACES[place]
    with monkeypatch.context() as patch:
        signalled(patch, hook, signal.SIGTERM, when)
        with pytest.raises(SystemExit) as stopped:
            run(stateful, tmp_path)
    assert stopped.value.code == 143
    assert written in names(tmp_path)[-1]
    assert not (tmp_path / "deploy").exists()
    run(stateful, tmp_path)
    assert not differing(outcome(undisturbed), outcome(tmp_path))


def test_an_interrupted_run_says_how_it_goes_on_and_does(
    stateful: dict[str, Any],
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        signalled(patch, "training_step", signal.SIGINT, lambda task, batch, i: task.current_epoch == 1)
        with pytest.raises(SystemExit) as stopped:
            run(stateful, tmp_path)
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    assert f"interrupted; go on with: python train.py resume=auto hydra.run.dir={tmp_path}" in said
    run(stateful, tmp_path)
    assert not differing(outcome(undisturbed), outcome(tmp_path))


def test_a_second_signal_leaves_at_once(
    stateful: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(task: ClassificationTask, *batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(ClassificationTask, "training_step", twice)
    with pytest.raises(SystemExit) as stopped:
        run(stateful, tmp_path)
    assert stopped.value.code == 130
    assert names(tmp_path) == []


def test_resumed_runs_may_be_stopped_again_and_again(
    stateful: dict[str, Any], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (3, 4, 8):
        with monkeypatch.context() as patch:
            signalled(patch, "training_step", signal.SIGTERM, lambda task, *_, at=step: task.global_step == at)
            with pytest.raises(SystemExit):
                run(stateful, tmp_path)
        assert names(tmp_path)[-1] == f"step-{step + 1:08d}.ckpt"
    run(stateful, tmp_path)
    assert not differing(outcome(undisturbed), outcome(tmp_path))


def test_a_disk_that_fills_up_stops_a_run_which_goes_on_when_there_is_space(
    stateful: dict[str, Any], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filled(task: ClassificationTask, *batch: Any) -> Any:
        if task.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        return step(task, *batch)

    step = ClassificationTask.training_step
    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "training_step", filled)
        try:
            with pytest.raises(CheckpointError, match=rf"cannot write {tmp_path}/checkpoints/step-00000008\.ckpt"):
                run(stateful, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_intact(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "step-00000006.ckpt", [])
    run(stateful, tmp_path)
    assert not differing(outcome(undisturbed), outcome(tmp_path))


def test_the_averages_are_what_is_exported(undisturbed: Path) -> None:
    content = read_checkpoint(undisturbed / "checkpoints" / "best.ckpt")
    weights, averages = content["current_model_state"], content["state_dict"]
    assert any(not torch.equal(weights[key], averages[key]) for key in weights)
    exported = load(undisturbed / "deploy" / "model.safetensors")
    expected = model_from_checkpoint(undisturbed / "checkpoints" / "best.ckpt")
    assert all(torch.equal(value, averages[f"model.{key}"]) for key, value in expected.state_dict().items())
    verify(expected, exported, torch.randn(3, 1, 32, 32)).raise_if_different("the exported model")


def test_the_newest_and_the_best_stay(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.5, 0.4, 0.3, 0.2])
    log = ClassificationTask.log_dict

    def worse(task: ClassificationTask, metrics: dict[str, Any], **options: Any) -> None:
        better = {"val/accuracy": torch.tensor(next(accuracies))} if "val/accuracy" in metrics else {}
        log(task, {**metrics, **better}, **options)

    monkeypatch.setattr(ClassificationTask, "log_dict", worse)
    run(tiny("trainer.max_epochs=4", "checkpoint.keep=2", "trainer.num_sanity_val_steps=0"), tmp_path)
    assert names(tmp_path) == ["step-00000002.ckpt", "step-00000006.ckpt", "step-00000008.ckpt"]
    links = {path.name: path.resolve().name for path in (tmp_path / "checkpoints").iterdir() if path.is_symlink()}
    assert links == {"best.ckpt": "step-00000002.ckpt", "last.ckpt": "step-00000008.ckpt"}


def test_checkpoints_within_an_epoch_come_every_so_many_steps(tiny: Any, tmp_path: Path) -> None:
    run(tiny("checkpoint.every_steps=2", "checkpoint.keep=9", "trainer.limit_train_batches=7"), tmp_path)
    assert names(tmp_path) == [f"step-{step:08d}.ckpt" for step in (2, 4, 6, 7)]


def test_none_is_written_between_the_batches_of_one_optimizer_step(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    write = RunCheckpoints._write

    def noting(callback: RunCheckpoints, trainer: Any, name: str) -> None:
        batches.append(trainer.fit_loop.batch_idx)
        write(callback, trainer, name)

    monkeypatch.setattr(RunCheckpoints, "_write", noting)
    counts = ("trainer.limit_train_batches=6", "trainer.accumulate_grad_batches=2", "checkpoint.every_steps=1")
    run(tiny(*counts), tmp_path)
    assert batches == [1, 3, 5]


def test_a_checkpoint_holds_every_state(undisturbed: Path) -> None:
    content = read_checkpoint(undisturbed / "checkpoints" / "last.ckpt")
    assert content["processes"][0]["random"].keys() >= {"python", "numpy", "torch"}
    assert content["processes"][0]["metrics"].keys() == {"train/loss", "train/accuracy"}
    assert {
        "optimizer_states",
        "lr_schedulers",
        "current_model_state",
        "loops",
        "geometry",
        "metrics",
    } <= content.keys()


@pytest.mark.parametrize(
    ("key", "value"), [("keep", "0"), ("keep", "null"), ("every_steps", "0"), ("every_steps", "a")]
)
def test_impossible_settings_are_refused(tiny: Any, tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"checkpoint\.{key}=\S+ needs to be a whole number, at least 1"):
        run(tiny(f"checkpoint.{key}={value}"), tmp_path)


def test_a_file_system_without_links_gets_copies(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refused)
    run(tiny(), tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert not last.is_symlink()
    assert last.read_bytes() == (tmp_path / "checkpoints" / "step-00000002.ckpt").read_bytes()
