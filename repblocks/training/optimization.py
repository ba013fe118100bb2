"""timm's optimizers, gradient re-parameterization and learning rate schedules, from configuration."""

from collections.abc import Mapping
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

SCHEDULES = ("constant", "cosine", "multistep", "none", "poly", "step", "tanh")
"""timm's schedules that follow the clock only; ``plateau`` needs a metric and is deprecated there."""
REPSGD = "repsgd"
"""timm's ``sgd`` with gradients multiplied by `RepOptimizer`."""


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


def make_optimizer(model: nn.Module, config: Mapping[str, Any], multipliers: Multipliers | None = None) -> Optimizer:
    """Build the optimizer; biases and the scales of normalisation layers are not decayed.

    Args:
        model: What is trained.
        config: ``name`` (timm's, or ``repsgd``), ``lr``, ``weight_decay`` and what else that optimizer takes.
        multipliers: Of ``repsgd``, as `trained_as` gives them with the model.

    Raises:
        ConfigurationError: Unknown name, arguments that the optimizer refuses, or ``repsgd`` without multipliers.
    """
    settings = dict(config)
    name = known_name("optimizer.name", str(settings.pop("name")), [*map(str, list_optimizers()), REPSGD])
    try:
        optimizer = create_optimizer_v2(model, "sgd" if name == REPSGD else name, **settings)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"optimizer {name} refuses {settings}: {error}; see configs/optimizer/") from error
    return _multiplying(optimizer, multipliers) if name == REPSGD else optimizer


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
