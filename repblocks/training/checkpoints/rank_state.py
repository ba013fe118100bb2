"""What differs between the processes of a run: random number generators and metrics over part of an epoch."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torchmetrics import Metric, MetricCollection

State = dict[str, Any]


def random_state() -> State:
    """The generators of Python, numpy, torch and, where there are GPUs, CUDA, in tensors and plain values."""
    kind, key, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - timm's mixup draws from it
    state: State = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(key).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    return {**state, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Continue the generators where `random_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, key, *rest = state["numpy"]
    np.random.set_state((kind, key.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def metric_states(metrics: MetricCollection) -> State:
    """The sums that metrics hold in this process, and how often they were updated."""
    return {
        name: {"sums": dict(metric.metric_state), "updates": metric.update_count} for name, metric in metrics.items()
    }


def set_metric_states(metrics: MetricCollection, states: Mapping[str, Any]) -> None:
    """Continue metrics where `metric_states` found them."""
    for name, state in states.items():
        _set(metrics[name], state["sums"], state["updates"])


def summed(states: Sequence[Mapping[str, Any]]) -> State:
    """The metric states of several processes as those of one: sums add."""
    first = states[0]
    return {
        name: {
            "sums": {key: sum(each[name]["sums"][key] for each in states) for key in first[name]["sums"]},
            "updates": max(each[name]["updates"] for each in states),
        }
        for name in first
    }


def _set(metric: Metric, sums: Mapping[str, Any], updates: int) -> None:
    for key, value in sums.items():
        setattr(metric, key, value.to(metric.device))
    metric._update_count = updates  # pyright: ignore[reportPrivateUsage]


def from_all(trainer: pl.Trainer, state: State) -> list[State]:
    """The states of all processes, in their order; every process has to ask."""
    if trainer.world_size == 1:
        return [state]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, state)
    return states
