import math
from typing import Any

import pytest
import torch
from torch import nn

import repblocks as rb
from repblocks.calibration import batch_norms
from repblocks.errors import ConfigurationError
from repblocks.training.optimization import interval, make_optimizer, make_scheduler, scaled_lr, trained_as

COSINE = {"name": "cosine", "warmup_epochs": 1, "warmup_lr": 0.1, "min_lr": 0.0}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return make_optimizer(network(), {"name": "sgd", "lr": lr})


def test_biases_and_batch_norm_are_not_decayed() -> None:
    optimizer = make_optimizer(network(), {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "betas": [0.8, 0.9]})
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(4, 3, 3, 3): 0.05, (2, 4): 0.05, (4,): 0.0, (2,): 0.0}


@pytest.mark.parametrize("group", ["adamw", "repsgd", "sgd"])
def test_every_configuration_decays_the_kernels_of_a_model_and_neither_biases_nor_norms(
    configure: Any, group: str
) -> None:
    config = configure(f"optimizer={group}")["optimizer"]
    block = {"block": "csla"} if group == "repsgd" else {}
    model, multipliers = trained_as(rb.create_model("rb_repvgg_cifar", depths=[1, 1, 1], **block), config)
    of_norms = {id(parameter) for norm in batch_norms(model) for parameter in norm.parameters()}
    optimizer = make_optimizer(model, config, multipliers, images_per_step=64)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[str] = set()
    for group_ in optimizer.param_groups:
        for parameter in group_["params"]:
            name = names[id(parameter)]
            spared = id(parameter) in of_norms or name.endswith(".bias")
            assert group_["weight_decay"] == (0 if spared else config["weight_decay"]), name
            seen.add(name)
    assert seen == set(names.values())
    assert of_norms


@pytest.mark.parametrize("group", ["adamw", "repsgd", "sgd"])
def test_the_learning_rates_of_the_configurations_are_taken_as_they_are(configure: Any, group: str) -> None:
    config = configure(f"optimizer={group}")["optimizer"]
    assert scaled_lr(config, 4096) == config["lr"]
    assert scaled_lr(config, None) == config["lr"]


@pytest.mark.parametrize(
    ("scale", "images", "expected"),
    [("linear", 256, 0.1), ("linear", 1024, 0.4), ("linear", 32, 0.0125), ("sqrt", 1024, 0.2)],
)
def test_the_learning_rate_follows_the_images_per_step(scale: str, images: int, expected: float) -> None:
    config = {"name": "sgd", "lr": 0.1, "lr_base_size": 256, "lr_base_scale": scale}
    assert scaled_lr(config, images) == pytest.approx(expected)
    optimizer = make_optimizer(network(), config, images_per_step=images)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_the_ends_of_a_schedule_do_not_scale() -> None:
    optimizer = make_optimizer(network(), {"name": "sgd", "lr": 1.0, "lr_base_size": 64}, images_per_step=256)
    scheduler = make_scheduler(optimizer, {**COSINE, "per": "epoch"}, epochs=4, updates_per_epoch=5)
    assert scheduler is not None
    seen = [optimizer.param_groups[0]["lr"]]
    for epoch in (1, 4):
        scheduler.step(epoch)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.1, 4 * 0.5 * (1 + math.cos(math.pi / 4)), 0.0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr_base_size": 0}, r"optimizer\.lr_base_size=0 needs to be a number of images"),
        ({"lr_base_size": True}, r"optimizer\.lr_base_size=True needs to be a number of images"),
        ({"lr_base_size": 2.5}, r"optimizer\.lr_base_size=2\.5 needs to be a number of images"),
        ({"lr_base_scale": "square"}, r"optimizer\.lr_base_scale=square is unknown.*sqrt"),
        ({"lr": None}, r"optimizer\.lr=None needs to be a number, to be scaled"),
    ],
)
def test_a_learning_rate_that_does_not_scale_is_refused(wrong: dict[str, Any], message: str) -> None:
    config = {"name": "sgd", "lr": 0.1, "lr_base_size": 256, "lr_base_scale": "linear", **wrong}
    with pytest.raises(ConfigurationError, match=message):
        make_optimizer(network(), config, images_per_step=64)


def test_a_learning_rate_does_not_scale_by_an_unknown_number_of_images() -> None:
    with pytest.raises(ConfigurationError, match=r"lr_base_size=256 scales .* images per step, which are not given"):
        make_optimizer(network(), {"name": "sgd", "lr": 0.1, "lr_base_size": 256})


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
