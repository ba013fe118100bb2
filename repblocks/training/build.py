"""The model and the task of a run from their groups of the configuration."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from repblocks.errors import ConfigurationError, DataError
from repblocks.models.registry import carry, create_model
from repblocks.training.checkpoints.geometry import geometry_of
from repblocks.training.data import ImageData
from repblocks.training.decay import decay_rate, require_folding
from repblocks.training.objective import Objective, make_teacher
from repblocks.training.optimization import trained_as
from repblocks.training.task import ClassificationTask

Config = Mapping[str, Any]


def make_model(config: Config, data: ImageData) -> nn.Module:
    """Create the model for the data's classes and channels; it carries the data's preprocessing and class names.

    Args:
        config: ``name``, ``pretrained`` and ``args``.
        data: What the model will be trained on.

    Raises:
        ConfigurationError: An unknown model, or arguments that it refuses.
        DataError: ``args`` ask for other classes or channels than the data has.
    """
    args = dict(config["args"])
    needed = {"num_classes": len(data.class_names), "in_chans": data.preprocessing.input_size[0]}
    for key, value in needed.items():
        if args.setdefault(key, value) != value:
            raise DataError(
                f"model.args.{key}={args[key]}, but data={data.config.name} has {value}; "
                "leave it out, it follows the data"
            )
    model = create_model(config["name"], pretrained=config["pretrained"], **args)
    facts = {"num_classes": needed["num_classes"], "label_names": list(data.class_names)}
    return carry(model, {**asdict(data.preprocessing), **facts})


def require_output(model: nn.Module, data: ImageData) -> None:
    """Run one image of zeros through the model, so that a size which it does not take is found before training.

    Raises:
        ConfigurationError: The model fails, or gives something else than logits ``[N, classes]``.
    """
    size, training = data.preprocessing.input_size, model.training
    got = f"{vars(model).get('model_name')} on images of {size[1]}x{size[2]} pixels"
    remedy = "set data.image_size to what the model takes, or +model.args.img_size=[HEIGHT,WIDTH] where it has that"
    try:
        with torch.no_grad():  # not inference_mode: what a model caches must stay usable in training
            logits = model.eval()(torch.zeros(1, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigurationError(f"{got} fails: {error}; {remedy}") from error
    model.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (1, len(data.class_names)):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigurationError(
            f"{got} gives {shape}, needed is one row of {len(data.class_names)} class scores; leave out the model.args "
            "that change its output"
        )


def make_task(config: Config, model: nn.Module, data: ImageData, trainer: pl.Trainer) -> ClassificationTask:
    """Create the training task, with a schedule as long as the trainer's run.

    Its model is the one given, or for ``optimizer=repsgd`` the plain network that it amounts to.

    Raises:
        ConfigurationError: An objective that is none, or a model that the optimizer does not train.
        DataError: The training images do not fill one batch.
    """
    assert trainer.max_epochs is not None
    classes = len(data.class_names)
    objective = Objective(config["objective"], classes, make_teacher(config["objective"], data.preprocessing, classes))
    if trainer.precision == "64-true":
        model.double()  # Lightning would do so after it has loaded a checkpoint, and so have rounded the weights
    trained, multipliers = trained_as(model, config["optimizer"])
    if decay_rate(config["optimizer"]):
        require_folding(trained)
    return ClassificationTask(
        trained,
        multipliers=multipliers,
        classes=classes,
        objective=objective,
        optimizer=config["optimizer"],
        scheduler=config["scheduler"],
        epochs=trainer.max_epochs,
        batches_per_epoch=batches_per_epoch(data, trainer),
        accumulate=trainer.accumulate_grad_batches,
        images_per_step=geometry_of(trainer, data).images_per_step,
        validate_deployed=flag(config, "validate_deployed"),
    )


def flag(config: Config, key: str) -> bool:
    """A value that is true or false.

    Raises:
        ConfigurationError: It is something else.
    """
    if not isinstance(config[key], bool):
        raise ConfigurationError(f"{key}={config[key]} needs to be true or false")
    return config[key]


def batches_per_epoch(data: ImageData, trainer: pl.Trainer) -> int:
    """Training batches that each process sees, from sizes alone.

    Lightning's ``estimated_stepping_batches`` would build the loaders early, which breaks the exact resume of loaders
    that keep a state.
    """
    batches, limit = data.training_batches(trainer.world_size), trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
