"""Averages of the weights: Lightning's callback, on the model alone and with all that a resumed run needs."""

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from repblocks.errors import ConfigurationError
from repblocks.names import known_name

Tensors = list[Tensor] | tuple[Tensor, ...]

_KEYS = ("decay", "every", "start_epoch")
_CURRENT, _STATE, _PREFIX = "current_model_state", "averaging_state", "module."


def make_averaging(config: Mapping[str, Any]) -> "Averaging | None":
    """The callback of the group ``ema``, or None where ``decay`` is null.

    Args:
        config: ``decay``, ``every`` and ``start_epoch``; see `Averaging`.

    Raises:
        ConfigurationError: A key that does not exist, or a value out of range.
    """
    for key in config:
        known_name("ema", key, _KEYS)
    decay, every, start = (config[key] for key in _KEYS)
    if decay is None:
        return None
    _require("decay", decay, "between 0 and 1, such as 0.9999", fits=isinstance(decay, float) and 0 < decay < 1)
    _require("every", every, "a number of optimizer steps, at least 1", fits=_is_whole(every, 1))
    _require("start_epoch", start, "a number of epochs, at least 0", fits=_is_whole(start, 0))
    return Averaging(decay, every=every, start_epoch=start)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require(key: str, value: Any, needed: str, *, fits: bool) -> None:
    if not fits:
        raise ConfigurationError(f"ema.{key}={value} needs to be {needed}; see configs/ema/")


class Averaging(EMAWeightAveraging):
    """Exponential moving averages of the weights and buffers of a task's ``model``, which validation sees.

    ``average = decay * average + (1 - decay) * weights`` after an optimizer step; the first update copies. Buffers of
    whole numbers, such as BatchNorm's counter, are copied by each update. What else the task holds (metrics, a teacher)
    is left alone, and nothing is sent between processes.

    Lightning's callback averages the whole task, truncates whole numbers, puts initial weights into validation and
    checkpoints until the first update, and makes its copy before the task has its device and precision. Here averages
    appear nowhere before they exist, and the copy is made when fitting starts.

    A checkpoint holds the averages as ``state_dict`` and the weights as ``current_model_state``, whether it is saved
    during validation, after it, or after the end of training. When training has ended the model is the average.

    Args:
        decay: Of the old average in each update.
        every: Optimizer steps from one update to the next.
        start_epoch: Epochs that pass before the first update.
    """

    def __init__(self, decay: float, *, every: int = 1, start_epoch: int = 0) -> None:
        super().__init__(decay=decay, update_every_n_steps=every)
        self.start_epoch = start_epoch
        self._update = _ema(decay)
        self._is_swapped = False
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the last run; the copy follows when the model has its device and precision."""
        if stage == TrainerFn.FITTING:
            self._average_model, self._is_swapped, self._restored = None, False, None
            self._latest_update_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the copy that becomes the average."""
        self._average_model = AveragedModel(_part(pl_module), use_buffers=True, multi_avg_fn=self._update)
        self._average_model.requires_grad_(requires_grad=False)
        self._restore(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average, if an optimizer step was taken that counts."""
        if trainer.current_epoch >= self.start_epoch:
            super().on_train_batch_end(trainer, _part(pl_module), outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the average, as soon as there is one."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._hold(pl_module, average=True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the weights in training."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._hold(pl_module, average=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the model; the weights stay known, for checkpoints that are saved later."""
        self._hold(pl_module, average=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A validation that was broken off leaves the weights in training."""
        self._hold(pl_module, average=False)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the averages where a model is looked for, and the weights in training beside them."""
        if self._average_model is None:
            return
        held = checkpoint["state_dict"]
        state = self._average_model.state_dict()
        aside = {f"model.{name[len(_PREFIX) :]}": value for name, value in state.items() if name.startswith(_PREFIX)}
        other = {**held, **aside} if self._has_average else held
        weights, average = (other, held) if self._is_swapped else (held, other)
        checkpoint["state_dict"], checkpoint[_CURRENT] = average, weights
        checkpoint[_STATE] = {name: value for name, value in state.items() if not name.startswith(_PREFIX)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Resume averages and weights; without averages in the file, the first update begins them.

        Outside of fitting the model keeps the file's ``state_dict``, which are the averages.
        """
        if trainer.state.fn != TrainerFn.FITTING or _CURRENT not in checkpoint:
            return
        self._restored = {key: checkpoint[key] for key in ("state_dict", _CURRENT, _STATE)}
        if self._average_model is not None:  # the strategy restores after its setup
            self._restore(pl_module)

    def _restore(self, pl_module: pl.LightningModule) -> None:
        if self._restored is None:
            return
        assert self._average_model is not None
        average, weights, state = self._restored.values()
        own = {_PREFIX + key[6:]: value for key, value in average.items() if key.startswith("model.")}
        self._average_model.load_state_dict({**own, **state})
        # Again, because the first time it may have been in another precision.
        pl_module.load_state_dict(weights, strict=pl_module.strict_loading)
        self._restored = None

    @property
    def _has_average(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    def _hold(self, pl_module: pl.LightningModule, *, average: bool) -> None:
        if average != self._is_swapped and self._has_average:
            self._swap_models(_part(pl_module))
            self._is_swapped = average


def _part(pl_module: pl.LightningModule) -> Any:
    """What is averaged; Lightning's methods ask for parameters and buffers only, which any module has."""
    return pl_module.get_submodule("model")


def _ema(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """The average of torch for tensors of one dtype, a copy where that dtype has whole numbers."""
    average = get_ema_multi_avg_fn(decay)

    def update(averages: Tensors, current: Tensors, count: Tensor | int) -> None:
        if averages[0].is_floating_point():
            average(averages, current, count)
        else:
            torch._foreach_copy_(averages, current)  # pyright: ignore  # as torch.optim does

    return update
