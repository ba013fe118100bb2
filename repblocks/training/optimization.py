"""timm's optimizers, gradient re-parameterization and learning rate schedules, from configuration."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

from timm.optim import create_optimizer_v2, list_optimizers  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn
from torch.optim import Optimizer

from repblocks.errors import ConfigurationError
from repblocks.expansion.recipe import recipe_of
from repblocks.header import describe, require_rebuildable
from repblocks.names import known_name
from repblocks.optim import Multipliers, RepOptimizer, plain_twin
from repblocks.training.decay import block_parameters, decay_rate, require_folding

SCHEDULES = ("constant", "cosine", "multistep", "none", "poly", "step", "tanh")
"""timm's schedules that follow the clock only; ``plateau`` needs a metric and is deprecated there."""
REPSGD = "repsgd"
"""timm's ``sgd`` with gradients multiplied by `RepOptimizer`."""
LR_SCALES: Mapping[str, Callable[[float], float]] = {"linear": lambda ratio: ratio, "sqrt": math.sqrt}
"""What the learning rate is multiplied by, where a step has ``ratio`` times the images that it is meant for."""
_OURS = ("lr_base_size", "lr_base_scale", "folded_decay")


def trained_as(model: nn.Module, config: Mapping[str, Any]) -> tuple[nn.Module, Multipliers]:
    """What an optimizer trains: the model; for ``repsgd`` its `plain_twin`, and the multipliers of that.

    Args:
        model: Not changed.
        config: As for `make_optimizer`.

    Raises:
        ConfigurationError: ``repsgd`` for a model without `CSLAConv` blocks, or an expanded one.
        CheckpointError: The twin is not what the model's name and arguments build with ``block="plain"``.
    """
    if config["name"] != REPSGD:
        return model, {}
    if recipe_of(model):
        raise ConfigurationError(
            "optimizer=repsgd trains the plain network, so there is nothing to expand; leave out model.expand, and "
            "set +model.args.block=csla"
        )
    plain, multipliers = plain_twin(model)
    require_rebuildable(plain, describe(plain))
    return plain, multipliers


def make_optimizer(
    model: nn.Module,
    config: Mapping[str, Any],
    multipliers: Multipliers | None = None,
    *,
    images_per_step: int | None = None,
) -> Optimizer:
    """Build the optimizer; biases and the scales of normalisation layers are not decayed.

    With ``folded_decay`` above 0, no parameter inside a block is decayed by the optimizer: the loss has to contain
    `repblocks.training.decay.decay_loss` instead.

    Args:
        model: What is trained.
        config: ``name`` (timm's, or ``repsgd``), ``lr``, ``weight_decay`` and what else that optimizer takes; and ours:
            ``lr_base_size`` and ``lr_base_scale``, as in `scaled_lr`, and ``folded_decay``.
        multipliers: Of ``repsgd``, as `trained_as` gives them with the model.
        images_per_step: Images behind one optimizer step, on all processes and over accumulated batches.

    Raises:
        ConfigurationError: Unknown name, arguments that the optimizer refuses, ``repsgd`` without multipliers, a
            learning rate that does not scale, or ``folded_decay`` for blocks that do not fold in training.
    """
    settings = {key: value for key, value in config.items() if key not in _OURS}
    name = known_name("optimizer.name", str(settings.pop("name")), [*map(str, list_optimizers()), REPSGD])
    settings["lr"] = scaled_lr(config, images_per_step)
    exempt = _undecayed(model, config)
    try:
        optimizer = create_optimizer_v2(model, "sgd" if name == REPSGD else name, **settings)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"optimizer {name} refuses {settings}: {error}; see configs/optimizer/") from error
    _leave_undecayed(optimizer, exempt)
    return _multiplying(optimizer, multipliers) if name == REPSGD else optimizer


def scaled_lr(config: Mapping[str, Any], images_per_step: int | None) -> float | None:
    """The learning rate for the images behind one step: ``lr * images_per_step / lr_base_size``, or sqrt of the ratio.

    Args:
        config: ``lr`` as it is meant for ``lr_base_size`` images, which are None where it is meant for any number of
            them; ``lr_base_scale``, "linear" or "sqrt".
        images_per_step: Images of a batch, times processes, times accumulated batches.

    Raises:
        ConfigurationError: An ``lr_base_size`` below 1, an unknown ``lr_base_scale``, no ``lr`` to scale, or nobody
            says how many images there are.

    Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", https://arxiv.org/abs/1706.02677, section 2.1.
    """
    lr, base = config.get("lr"), config.get("lr_base_size")
    scale = LR_SCALES[known_name("optimizer.lr_base_scale", str(config.get("lr_base_scale", "linear")), LR_SCALES)]
    if base is None:
        return lr
    _require_scalable(lr, base, images_per_step)
    return float(lr * scale(images_per_step / base))  # pyright: ignore[reportOptionalOperand]  # required above


def _require_scalable(lr: Any, base: Any, images_per_step: int | None) -> None:
    if isinstance(base, bool) or not isinstance(base, int) or base < 1:
        raise ConfigurationError(
            f"optimizer.lr_base_size={base} needs to be a number of images, at least 1; 256 is usual, null takes "
            "optimizer.lr as it is"
        )
    if isinstance(lr, bool) or not isinstance(lr, int | float):
        raise ConfigurationError(f"optimizer.lr={lr} needs to be a number, to be scaled by optimizer.lr_base_size")
    if images_per_step is None:
        raise ConfigurationError(
            f"optimizer.lr_base_size={base} scales the learning rate by the images per step, which are not given; pass "
            "images_per_step, or set optimizer.lr_base_size=null"
        )


def _undecayed(model: nn.Module, config: Mapping[str, Any]) -> list[nn.Parameter]:
    """The parameters that `decay_loss` takes care of."""
    rate = decay_rate(config)
    if not rate:
        return []
    require_folding(model)
    return block_parameters(model)


def _leave_undecayed(optimizer: Optimizer, exempt: Iterable[nn.Parameter]) -> None:
    """Move parameters to groups of their own without decay, whatever rule made the groups."""
    marked = {id(parameter) for parameter in exempt}
    for group in [group for group in optimizer.param_groups if group.get("weight_decay")]:
        moved = [parameter for parameter in group["params"] if id(parameter) in marked]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in marked]
        if moved:
            optimizer.param_groups.append({**group, "params": moved, "weight_decay": 0.0})


def _multiplying(optimizer: Optimizer, multipliers: Multipliers | None) -> Optimizer:
    if not multipliers:
        raise ConfigurationError("optimizer repsgd got no multipliers, and is sgd without them; see trained_as")
    return RepOptimizer(optimizer, multipliers)


def make_scheduler(
    optimizer: Optimizer, config: Mapping[str, Any], *, epochs: int, updates_per_epoch: int
) -> Scheduler | None:
    """Build the learning rate schedule over ``epochs``, or None for ``none``.

    Args:
        optimizer: Its groups' learning rates are the peak.
        config: ``name`` (timm's), ``per`` (``"update"`` or ``"epoch"``) and arguments of timm's
            ``create_scheduler_v2`` such as ``warmup_epochs``.
        epochs: Length of the whole schedule, warm-up included.
        updates_per_epoch: Optimizer steps per epoch.

    Raises:
        ConfigurationError: Unknown name, or arguments that the schedule refuses.
    """
    settings = dict(config)
    name = known_name("scheduler.name", str(settings.pop("name")), SCHEDULES)
    per = known_name("scheduler.per", str(settings.pop("per")), ("epoch", "update"))
    length: dict[str, Any] = {"num_epochs": epochs, "updates_per_epoch": updates_per_epoch}
    try:
        scheduler, _ = create_scheduler_v2(optimizer, name, step_on_epochs=per == "epoch", **length, **settings)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"scheduler {name} refuses {settings}: {error}; see configs/scheduler/") from error
    return cast("Scheduler | None", scheduler)


def interval(scheduler: Scheduler) -> Literal["epoch", "step"]:
    """When Lightning has to step it."""
    return "epoch" if scheduler.t_in_epochs else "step"
