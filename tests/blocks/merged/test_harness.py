"""The comparison itself: it sees every number of a step, and accepts what is the same."""

import pytest
import torch
from blocks.claims import BUILDERS
from blocks.merged.cases import EXACT, GEOMETRIES, differences, largest, made, scales, stepped
from blocks.merged.mixtures import make_mixture


def compared(make, place):
    block, x = made(make, GEOMETRIES[place]), GEOMETRIES[place].image()
    expected = stepped(block, x, "separate")
    return expected, scales(block, x, expected)


@pytest.mark.parametrize("place", ["dense", "depthwise", "pointwise_with_identity"])
def test_separate_branches_are_the_same_as_themselves(place):
    expected, scale = compared(BUILDERS["mobileone"], place)
    again, _ = compared(BUILDERS["mobileone"], place)
    assert not differences(again, expected, scale)


@pytest.mark.parametrize("place", ["dense", "depthwise", "pointwise_with_identity"])
def test_an_error_in_one_entry_of_any_number_is_seen(place):
    expected, scale = compared(make_mixture("norms_of_all_kinds"), place)
    for name, tensor in expected.items():
        wrong = tensor.clone()
        wrong[(-1,) * wrong.ndim] += 1 if tensor.dtype == torch.int64 else 2 * EXACT * scale[name]
        assert list(differences({**expected, name: wrong}, expected, scale)) == [name]


def test_a_value_that_is_not_a_number_is_seen():
    expected, scale = compared(BUILDERS["repvgg"], "dense")
    wrong = {**expected, "output": torch.full_like(expected["output"], float("nan"))}
    assert list(differences(wrong, expected, scale)) == ["output"]


def test_only_what_cancels_is_compared_on_a_larger_scale():
    expected, scale = compared(BUILDERS["repvgg"], "depthwise")
    enlarged = {name for name, tensor in expected.items() if scale[name] > 10 * largest(tensor)}
    assert enlarged == {"gradient of branches.pointwise.0.weight"}
    assert scale["gradient of branches.pointwise.0.weight"] < 1e3
