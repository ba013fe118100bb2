import io
import random

import numpy as np
import torch
from torchmetrics import MeanMetric, MetricCollection

from repblocks.training.checkpoints.rank_state import (
    metric_states,
    random_state,
    set_metric_states,
    set_random_state,
    summed,
)


def drawn() -> list[float]:
    return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002


def through_a_file(state: dict[str, object]) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_generator_goes_on_where_it_was_after_a_file_without_pickled_code() -> None:
    drawn()  # an odd number of normal numbers, whose other halves are part of the state
    state = random_state()
    expected = drawn()
    drawn()
    set_random_state(through_a_file(state))
    assert drawn() == expected


def metrics(*values: float) -> MetricCollection:
    collection = MetricCollection({"loss": MeanMetric()}, compute_groups=False)
    for value in values:
        collection["loss"].update(value)
    return collection


def test_metrics_go_on_where_they_were() -> None:
    states, resumed = through_a_file(metric_states(metrics(1.0, 2.0))), metrics()
    set_metric_states(resumed, states)
    resumed["loss"].update(6.0)
    assert resumed.compute()["loss"].item() == 3.0


def test_the_metrics_of_two_processes_are_those_of_one_that_saw_all() -> None:
    resumed = metrics()
    set_metric_states(resumed, summed([metric_states(metrics(1.0, 2.0)), metric_states(metrics(6.0))]))
    assert resumed.compute()["loss"].item() == 3.0
