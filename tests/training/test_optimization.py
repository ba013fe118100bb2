import math
from typing import Any

import pytest
import torch
from torch import nn

from repblocks.errors import ConfigurationError
from repblocks.training.optimization import interval, make_optimizer, make_scheduler

COSINE = {"name": "cosine", "warmup_epochs": 1, "warmup_lr": 0.1, "min_lr": 0.0}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return make_optimizer(network(), {"name": "sgd", "lr": lr})


def test_biases_and_batch_norm_are_not_decayed() -> None:
    optimizer = make_optimizer(network(), {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "betas": [0.8, 0.9]})
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(4, 3, 3, 3): 0.05, (2, 4): 0.05, (4,): 0.0, (2,): 0.0}


def test_an_unknown_optimizer_names_near_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"optimizer\.name=adamww is unknown.*adamw"):
        make_optimizer(network(), {"name": "adamww", "lr": 1.0})


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"lr": 1.0, "speed": 3}])
def test_arguments_that_the_optimizer_refuses_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="optimizer sgd refuses"):
        make_optimizer(network(), {"name": "sgd", **wrong})


def rates(config: dict[str, Any], *, epochs: int, updates: int) -> list[float]:
    """The rate of each clock tick of a whole run."""
    optimizer = sgd()
    scheduler = make_scheduler(optimizer, config, epochs=epochs, updates_per_epoch=updates)
    assert scheduler is not None
    seen: list[float] = []
    for tick in range(epochs * (updates if interval(scheduler) == "step" else 1)):
        seen.append(optimizer.param_groups[0]["lr"])
        scheduler.step(tick + 1)
        scheduler.step_update(tick + 1)
    return seen


def test_per_update_the_rate_warms_up_and_follows_a_cosine_within_epochs() -> None:
    seen = rates({**COSINE, "per": "update"}, epochs=4, updates=5)
    assert seen[:5] == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82])
    assert seen[5:] == pytest.approx([0.5 * (1 + math.cos(math.pi * t / 20)) for t in range(5, 20)])


def test_per_epoch_the_rate_changes_between_epochs() -> None:
    seen = rates({**COSINE, "per": "epoch"}, epochs=4, updates=5)
    assert seen == pytest.approx([0.1, *(0.5 * (1 + math.cos(math.pi * t / 4)) for t in (1, 2, 3))])


def test_without_schedule_the_rate_stays() -> None:
    assert make_scheduler(sgd(), {"name": "none", "per": "epoch"}, epochs=3, updates_per_epoch=2) is None


@pytest.mark.parametrize(
    ("wrong", "near"), [({"name": "cosin"}, "cosine"), ({"name": "plateau"}, ""), ({"per": "step"}, "update")]
)
def test_unknown_schedules_name_near_ones(wrong: dict[str, str], near: str) -> None:
    with pytest.raises(ConfigurationError, match=f"is unknown.*{near}"):
        make_scheduler(sgd(), {**COSINE, "per": "update", **wrong}, epochs=2, updates_per_epoch=2)


def test_arguments_that_the_schedule_refuses_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"scheduler cosine refuses.*speed"):
        make_scheduler(sgd(), {**COSINE, "per": "update", "speed": 3}, epochs=2, updates_per_epoch=2)
