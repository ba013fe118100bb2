from collections import Counter
from itertools import chain, islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repblocks.training.data.batches import Draw, EpochBatches, EvaluationBatches, Share
from repblocks.training.data.resizing import Growth

SIZE = (8, 8)


def batches(images: int, rank: int = 0, processes: int = 1, **options: Any) -> EpochBatches:
    defaults: dict[str, Any] = {"batch_size": 4, "seed": 0, "drop_last": True, "size_at": lambda epoch: SIZE}
    return EpochBatches(images, share=Share(rank, processes), **{**defaults, **options})


def order(sampler: EpochBatches) -> list[int]:
    return [draw.image for draw in chain.from_iterable(sampler)]


def test_an_epoch_has_every_image_once_in_another_order_each_time() -> None:
    sampler = batches(40)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(order(sampler))
    assert all(sorted(each) == list(range(40)) for each in orders)
    assert len({tuple(each) for each in [*orders, range(40), order(batches(40, seed=1))]}) == 5


def test_the_order_depends_on_the_seed_and_the_epoch_only() -> None:
    first, second = batches(40), batches(40, epoch=2)
    first.set_epoch(1)
    list(first)
    first.set_epoch(2)
    assert list(first) == list(second)
    assert {draw.epoch for draw in chain.from_iterable(second)} == {2}


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4))
def test_processes_together_see_the_batches_of_one(images: int, batch_size: int, processes: int) -> None:
    whole = list(batches(images, batch_size=batch_size * processes))
    parts = [list(batches(images, rank, processes, batch_size=batch_size)) for rank in range(processes)]
    assert [list(chain(*slices)) for slices in zip(*parts, strict=True)] == whole


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4))
def test_an_incomplete_last_batch_is_shared_out_evenly(images: int, batch_size: int, processes: int) -> None:
    parts = [
        list(batches(images, rank, processes, batch_size=batch_size, drop_last=False)) for rank in range(processes)
    ]
    assert len({tuple(len(batch) for batch in part) for part in parts}) == 1
    assert all(
        len(part) == len(batches(images, 0, processes, batch_size=batch_size, drop_last=False)) for part in parts
    )
    seen = Counter(draw.image for part in parts for draw in chain(*part))
    assert set(seen) == set(range(images))
    assert seen.total() - images < processes


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("given_out", range(10))
def test_it_resumes_after_any_batch(given_out: int, *, drop_last: bool) -> None:
    sampler = batches(42, epoch=3, drop_last=drop_last)
    before = list(islice(sampler, given_out))
    resumed = batches(42, drop_last=drop_last)
    resumed.load_state_dict(sampler.state_dict())
    assert before + list(resumed) == list(batches(42, epoch=3, drop_last=drop_last))
    assert len(list(resumed)) == len(resumed)


def test_the_end_of_an_epoch_is_the_start_of_the_next() -> None:
    sampler = batches(42, epoch=3)
    list(sampler)
    resumed = batches(42)
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.state_dict() == {"epoch": 4, "position": 0}
    assert list(resumed) == list(batches(42, epoch=4))


def test_an_iterator_that_is_thrown_away_takes_nothing() -> None:
    sampler = batches(40, position=8)
    iter(sampler)
    assert list(sampler) == list(batches(40))[2:]


def test_a_position_belongs_to_its_epoch() -> None:
    sampler = batches(40, position=8)
    sampler.set_epoch(0)
    assert sampler.state_dict()["position"] == 8
    sampler.set_epoch(1)
    assert list(sampler) == list(batches(40, epoch=1))


def test_another_number_of_processes_goes_on_at_the_same_position() -> None:
    two = [batches(48, rank, 2) for rank in (0, 1)]
    seen = [draw for sampler in two for batch in islice(sampler, 2) for draw in batch]
    three = [batches(48, rank, 3) for rank in (0, 1, 2)]
    for sampler in three:
        sampler.load_state_dict(two[0].state_dict())
    seen += [draw for sampler in three for batch in sampler for draw in batch]
    assert len({draw.image for draw in seen}) == len(seen) == 16 + 24


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4))
def test_processes_evaluate_every_image_once_in_as_many_batches(images: int, batch_size: int, processes: int) -> None:
    parts = [
        EvaluationBatches(images, batch_size=batch_size, share=Share(rank, processes), size=SIZE)
        for rank in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    assert all(len(list(part)) == len(part) for part in parts)
    assert len({tuple(len(batch) for batch in part) for part in parts}) == 1
    counted = [draw.image for part in parts for draw in chain(*part) if draw.counts]
    assert sorted(counted) == list(range(images))


def test_one_process_evaluates_in_order_and_without_padding() -> None:
    draws = list(chain(*EvaluationBatches(5, batch_size=2, share=Share(), size=SIZE)))
    assert draws == [Draw(0, image, SIZE) for image in range(5)]


def test_images_grow_in_steps_until_they_have_their_size() -> None:
    growth = Growth(start=(128, 96), end=(224, 96), epochs=8)
    assert [growth(epoch) for epoch in range(10)] == [
        *[(128, 96)] * 3, *[(160, 96)] * 3, *[(192, 96)] * 2, *[(224, 96)] * 2
    ]  # fmt: skip


def test_a_batch_has_the_size_of_its_epoch() -> None:
    sampler = batches(8, size_at=Growth(start=(32, 32), end=(64, 64), epochs=1))
    assert {draw.size for draw in chain(*sampler)} == {(32, 32)}
    sampler.set_epoch(1)
    assert {draw.size for draw in chain(*sampler)} == {(64, 64)}
