import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback, Checkpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import repblocks as rb
from repblocks.errors import ConfigurationError
from repblocks.training.averaging import Averaging, make_averaging
from repblocks.training.data.loaders import stateful_loader

CONFIGS = Path(__file__).parents[2] / "configs"
DECAY = 0.6
STEPS = 4  # of an epoch
State = dict[str, Tensor]


class Task(pl.LightningModule):
    """A model with what a task holds besides: metrics in the state dict, a buffer that is none of the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            rb.RepVGGConv(3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )
        self.model.register_buffer("steps", torch.tensor(0))
        self.model.register_buffer("constant", torch.tensor(0.1))
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.accuracy.persistent(mode=True)
        self.register_buffer("seen", torch.tensor(0.0))
        self.history: list[State] = []
        self.validated: list[State] = []

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        images, labels = batch
        self.model.steps += 1
        self.seen += 1
        logits = self.model(images)
        self.accuracy.update(logits, labels)
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.validated.append(state(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Recorder(Callback):
    """Remembers the weights after each batch."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.history.append(state(pl_module))


class Saver(Checkpoint):
    """Calls back at moments at which a checkpoint might be saved, with all other callbacks in front of it."""

    def __init__(self, **moments: Callable[[pl.Trainer, Any], Any]) -> None:
        for name, call in moments.items():
            setattr(self, name, lambda trainer, task, *_, call=call: call(trainer, task))


def state(task: Any) -> State:
    return {name: value.detach().clone() for name, value in task.model.state_dict().items()}


def loader() -> Any:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4 * STEPS, 3, 6, 5, generator=generator)
    return stateful_loader(TensorDataset(images, torch.arange(4 * STEPS) % 3), batch_size=4, workers=0)


def fit(
    task: Task, averaging: Averaging, *callbacks: Callback, epochs: int = 2, path: Path | None = None, **options: Any
) -> pl.Trainer:
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    settings |= {
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
    }
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[averaging, Recorder(), *callbacks], **settings, **options)
    trainer.fit(task, loader(), loader(), ckpt_path=path, weights_only=True)
    return trainer


def seeded() -> Task:
    torch.manual_seed(0)
    return Task()


def average(history: list[State], decay: float = DECAY) -> State:
    """Their moving average, as its definition says."""
    found = {name: value.double() for name, value in history[0].items()}
    for weights in history[1:]:
        found = {name: decay * value + (1 - decay) * weights[name] for name, value in found.items()}
    return {
        name: value.to(history[0][name].dtype) if history[0][name].is_floating_point() else history[-1][name]
        for name, value in found.items()
    }


def assert_close(found: State, expected: State) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def of_model(entries: State) -> State:
    return {name.removeprefix("model."): value for name, value in entries.items() if name.startswith("model.")}


def test_the_average_of_weights_and_statistics_is_validated_and_left_in_the_model() -> None:
    task = seeded()
    fit(task, Averaging(DECAY), num_sanity_val_steps=0)
    assert len(task.history) == 2 * STEPS
    assert_close(task.validated[0], average(task.history[:STEPS]))
    assert_close(state(task), average(task.history))


def test_counters_are_copied_and_constants_stay_exact() -> None:
    task = seeded()
    fit(task, Averaging(0.9), epochs=5)
    assert state(task)["steps"] == 5 * STEPS
    assert state(task)["0.branches.pointwise.1.num_batches_tracked"] == 5 * STEPS
    assert torch.equal(state(task)["constant"], torch.tensor(0.1))


def test_averaging_does_not_change_training() -> None:
    plain, averaged = seeded(), seeded()
    fit(plain, Averaging(DECAY, start_epoch=99))
    fit(averaged, Averaging(DECAY))
    for found, expected in zip(averaged.history, plain.history, strict=True):
        assert_equal(found, expected)


def test_what_is_not_of_the_model_is_left_alone() -> None:
    task = seeded()
    seen: list[tuple[float, float]] = []
    note = Saver(
        on_validation_start=lambda _, t: seen.append((float(t.seen), float(t.accuracy.tp.sum() + t.accuracy.fn.sum())))
    )
    fit(task, Averaging(DECAY), note, num_sanity_val_steps=0)
    assert seen == [(STEPS, 4 * STEPS), (2 * STEPS, 8 * STEPS)]
    assert float(task.seen) == 2 * STEPS


def test_every_so_many_steps_the_average_is_updated() -> None:
    task = seeded()
    fit(task, Averaging(DECAY, every=3))
    assert_close(state(task), average([task.history[step] for step in (0, 3, 6)]))


def test_accumulated_batches_are_one_update() -> None:
    task = seeded()
    fit(task, Averaging(DECAY), accumulate_grad_batches=2)
    assert_close(state(task), average(task.history[1::2]))


def test_until_it_starts_the_weights_themselves_are_validated_and_saved(tmp_path: Path) -> None:
    task, path = seeded(), tmp_path / "first.ckpt"
    save = Saver(on_validation_end=lambda trainer, _: path.exists() or trainer.save_checkpoint(path))
    fit(task, Averaging(DECAY, start_epoch=1), save, epochs=3, num_sanity_val_steps=0)
    assert_equal(task.validated[0], task.history[STEPS - 1])
    saved = torch.load(path, weights_only=True)
    assert_equal(of_model(saved["state_dict"]), task.history[STEPS - 1])
    assert_equal(of_model(saved["current_model_state"]), task.history[STEPS - 1])
    assert_close(state(task), average(task.history[STEPS:]))


def test_the_sanity_check_sees_the_initial_weights_and_leaves_them() -> None:
    task = seeded()
    fit(task, Averaging(DECAY), epochs=1, num_sanity_val_steps=1)
    assert_equal(task.validated[0], state(seeded()))
    assert_close(task.validated[1], average(task.history))


@pytest.mark.parametrize("stop", [1, STEPS - 1, STEPS + 2])
def test_a_resumed_run_ends_bit_identically(tmp_path: Path, stop: int) -> None:
    path = tmp_path / "stopped.ckpt"

    def save(trainer: pl.Trainer, task: Any) -> None:
        if trainer.global_step == stop and not path.exists():
            trainer.save_checkpoint(path)

    whole, resumed, averaging = seeded(), seeded(), Averaging(DECAY)
    fit(whole, Averaging(DECAY), Saver(on_train_batch_end=save), epochs=3)
    fit(resumed, averaging, epochs=3, path=path)
    assert len(resumed.history) == 3 * STEPS - stop
    for found, expected in zip(resumed.history, whole.history[stop:], strict=True):
        assert_equal(found, expected)
    assert_equal(resumed.validated[-1], whole.validated[-1])
    assert_equal(state(resumed), state(whole))
    averaging._hold(resumed, average=False)
    assert_equal(state(resumed), whole.history[-1])
    assert float(resumed.seen) == float(whole.seen)


def test_the_sanity_check_of_a_resumed_run_sees_the_average_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "first.ckpt"
    save = Saver(on_train_epoch_end=lambda trainer, _: path.exists() or trainer.save_checkpoint(path))
    whole, resumed = seeded(), seeded()
    fit(whole, Averaging(DECAY), save)
    fit(resumed, Averaging(DECAY), path=path, num_sanity_val_steps=1)
    assert_close(resumed.validated[0], average(whole.history[:STEPS]))
    assert_equal(state(resumed), state(whole))


def saved_at(moment: str, tmp_path: Path) -> tuple[dict[str, Any], Task]:
    """A checkpoint of the first such moment after the first epoch, read without code, and the task after training."""
    task, path = seeded(), tmp_path / "saved.ckpt"
    save = Saver(**{moment: lambda trainer, _: path.exists() or trainer.save_checkpoint(path)})
    fit(task, Averaging(DECAY), save, epochs=2, num_sanity_val_steps=0)
    return torch.load(path, weights_only=True), task


@pytest.mark.parametrize(
    ("moment", "steps"),
    [
        ("on_train_batch_end", 1),
        ("on_validation_batch_end", STEPS),
        ("on_validation_end", STEPS),
        ("on_train_epoch_end", STEPS),
        ("on_train_end", 2 * STEPS),
    ],
)
def test_a_checkpoint_of_any_moment_holds_the_average_and_the_weights(tmp_path: Path, moment: str, steps: int) -> None:
    saved, task = saved_at(moment, tmp_path)
    assert_equal(of_model(saved["current_model_state"]), task.history[steps - 1])
    assert_close(of_model(saved["state_dict"]), average(task.history[:steps]))
    assert saved["averaging_state"] == {"n_averaged": torch.tensor(steps)}
    assert saved["state_dict"]["seen"] == saved["current_model_state"]["seen"] == steps
    assert saved["state_dict"].keys() == task.state_dict().keys()


def test_during_validation_the_weights_in_training_are_put_aside() -> None:
    task, averaging = seeded(), Averaging(DECAY)
    seen: list[tuple[bool, bool, bool, State]] = []

    def look(trainer: pl.Trainer, task: Any) -> None:
        held = averaging._is_swapped
        averaging._hold(task, average=False)
        within = averaging._is_swapped
        averaging._hold(task, average=False)
        seen.append((held, within, averaging._is_swapped, state(task)))
        averaging._hold(task, average=held)
        assert averaging._is_swapped == held

    fit(task, averaging, Saver(on_validation_batch_end=look, on_train_batch_end=look), epochs=1, num_sanity_val_steps=0)
    assert [flags for *flags, _ in seen] == [[False] * 3] * STEPS + [[True, False, False]] * STEPS
    assert_equal(seen[-1][-1], task.history[-1])
    assert_close(task.validated[-1], average(task.history))


def test_a_validation_that_fails_leaves_the_weights_in_training() -> None:
    task, averaging = seeded(), Averaging(DECAY)

    def fail(trainer: pl.Trainer, task: Any) -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        fit(task, averaging, Saver(on_validation_batch_end=fail), num_sanity_val_steps=0)
    assert not averaging._is_swapped
    assert_equal(state(task), task.history[-1])


def test_double_precision_is_kept_in_the_average_and_in_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "double.ckpt"
    save = Saver(on_train_epoch_end=lambda trainer, _: path.exists() or trainer.save_checkpoint(path))
    whole, resumed = seeded(), seeded()
    fit(whole, Averaging(DECAY), save, precision="64-true")
    fit(resumed, Averaging(DECAY), path=path, precision="64-true", num_sanity_val_steps=0)
    assert state(resumed)["4.weight"].dtype == torch.float64
    assert_equal(state(resumed), state(whole))
    torch.testing.assert_close(state(whole), average(whole.history), rtol=1e-12, atol=1e-14)


def test_a_file_without_averages_starts_them_anew(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    save = Saver(on_train_epoch_end=lambda trainer, _: path.exists() or trainer.save_checkpoint(path))
    fit(seeded(), Averaging(DECAY), save)
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = saved["current_model_state"]
    del saved["current_model_state"], saved["averaging_state"]
    saved["callbacks"] = {}
    torch.save(saved, path)
    resumed = seeded()
    fit(resumed, Averaging(DECAY), path=path, epochs=2, num_sanity_val_steps=0)
    assert_close(state(resumed), average(resumed.history))


def test_validating_and_testing_afterwards_see_the_average_of_the_model_or_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "first.ckpt"
    task, averaging = seeded(), Averaging(DECAY)
    save = Saver(on_train_epoch_end=lambda trainer, _: path.exists() or trainer.save_checkpoint(path))
    trainer = fit(task, averaging, save)
    found = state(task)
    trainer.validate(task, loader(), verbose=False)
    assert_equal(task.validated[-1], found)
    trainer.validate(task, loader(), ckpt_path=path, weights_only=True, verbose=False)
    assert_close(task.validated[-1], average(task.history[:STEPS]))


def test_a_callback_serves_a_second_run() -> None:
    averaging = Averaging(DECAY)
    fit(seeded(), averaging)
    task = seeded()
    fit(task, averaging, epochs=1)
    assert_close(state(task), average(task.history))


def group(name: str, **changes: Any) -> dict[str, Any]:
    """The group as train.py composes it."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose(f"ema/{name}"), resolve=True)
    return {**copy.deepcopy(values)["ema"], **changes}  # pyright: ignore


def test_the_configuration_is_off_or_on() -> None:
    assert make_averaging(group("off")) is None
    on = make_averaging(group("on", start_epoch=2, every=5))
    assert on is not None
    assert (on.start_epoch, on.update_every_n_steps) == (2, 5)
    weights = [torch.tensor([1.0], dtype=torch.float64)], [torch.tensor([2.0], dtype=torch.float64)]
    on._update(*weights, 1)  # pyright: ignore[reportPrivateUsage]
    assert weights[0][0].item() == pytest.approx(1.0001, rel=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decay": 1.0}, r"ema\.decay=1\.0 needs to be between 0 and 1"),
        ({"decay": True}, r"ema\.decay=True needs to be between 0 and 1"),
        ({"decay": "0.9"}, r"ema\.decay=0\.9 needs to be between 0 and 1"),
        ({"every": 0}, r"ema\.every=0 needs to be a number of optimizer steps"),
        ({"start_epoch": -1}, r"ema\.start_epoch=-1 needs to be a number of epochs"),
        ({"dekay": 0.9}, r"ema=dekay is unknown.*decay"),
    ],
)
def test_an_impossible_configuration_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_averaging(group("on", **wrong))
