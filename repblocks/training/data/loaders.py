"""The loader of torchdata, which stops and resumes in the middle of an epoch."""

import warnings
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader


def stateful_loader(images: Any, *, workers: int, **options: Any) -> StatefulDataLoader[Any]:
    """A loader with or without worker processes.

    Args:
        images: A dataset.
        workers: Processes that read ahead, for as long as the loader is used; 0 reads when asked.
        options: Of torchdata's ``StatefulDataLoader``.
    """
    with warnings.catch_warnings():
        # torchdata 0.11 tells torch about every loader in a way that torch 2.14 takes no notice of.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        return StatefulDataLoader(
            images,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Loaders draw seeds for their workers; ours need none, and the training's generator must not move.
            generator=torch.Generator(),
            **options,
        )
