"""Accuracy of any model on any labelled images, in one process."""

import torch
from rich import get_console
from rich.progress import track
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from repblocks.errors import DataError
from repblocks.training.data import IGNORED, ImageData, Loader


def accuracy(model: nn.Module, loader: Loader, *, classes: int, what: str) -> float:
    """Fraction of images classified right, each counted once, in float32; those labelled ``IGNORED`` are left out.

    It runs in this process only, so it may be called by one rank of a distributed job.

    Args:
        model: In eval mode; its device is used.
        loader: Batches of images, labels and positions.
        classes: Number of classes.
        what: Shown beside the progress bar.
    """
    device = next(model.parameters()).device
    metric = MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED, sync_on_compute=False).to(device)
    with torch.inference_mode():
        for images, labels, _ in track(loader, what, transient=True, disable=not get_console().is_terminal):
            metric.update(model(images.to(device)), labels.to(device))
    return metric.compute().item()


def require_fit(model: nn.Module, data: ImageData) -> None:
    """Check that a model can be evaluated on a dataset, as far as the model says what it takes and gives.

    Raises:
        DataError: Its number of classes, its class names or its input channels are not the data's.
    """
    facts = vars(model)
    classes, names = facts.get("num_classes"), (facts.get("pretrained_cfg") or {}).get("label_names")
    if classes not in (None, len(data.class_names)):
        raise DataError(
            f"the model has {classes} classes and data={data.config.name} has {len(data.class_names)}; choose the "
            "dataset it was trained on with data=..., and data.root=... where it has one"
        )
    if names is not None and tuple(names) != data.class_names:
        wrong = next(pair for pair in zip(names, data.class_names, strict=True) if pair[0] != pair[1])
        raise DataError(
            f"the model's classes are not those of data={data.config.name}: it calls one {wrong[0]!r} where the data "
            f"says {wrong[1]!r}; choose the dataset it was trained on with data=..."
        )
    channels = facts.get("model_args", {}).get("in_chans")
    if channels not in (None, data.preprocessing.input_size[0]):
        raise DataError(
            f"the model takes images of {channels} channel(s), data={data.config.name} gives "
            f"{data.preprocessing.input_size[0]}; set data.in_chans={channels} if the dataset allows it"
        )
