"""Compiled blocks in training mode leave what eager ones leave."""

import pytest
import torch
from blocks.claims import BUILDERS
from blocks.merged.cases import assert_same_step, differences, in_execution, made, over, scales, step, stepped

PLACES = {
    "dense": over(4, 4, 3, batch=2),
    "pointwise": over(6, 6, 1),
    "depthwise": over(4, 4, 3, groups=4, channels_last=True),
}


@pytest.mark.parametrize("execution", ["auto", "patches", "outputs"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["mobileone", "repvit"])
def test_a_compiled_block_leaves_the_same(name, place, execution):
    torch.compiler.reset()
    block, x = made(BUILDERS[name], PLACES[place]), PLACES[place].image()
    expected = stepped(block, x, "separate")
    twin = in_execution(block, execution)
    twin.compile(backend="aot_eager")
    wrong = differences(step(twin, x), expected, scales(block, x, expected))
    assert not wrong, wrong


@pytest.mark.slow
def test_inductor_leaves_the_same():
    torch.compiler.reset()
    place = over(4, 4, 1, size=(5, 6))
    block, x = made(BUILDERS["repvgg"], place), place.image()
    expected = stepped(block, x, "separate")
    twin = in_execution(block, "merged")
    twin.compile(options={"compile_threads": 1, "cpp.simdlen": 1})  # a third of the time goes into looking for more
    wrong = differences(step(twin, x), expected, scales(block, x, expected))
    assert not wrong, wrong


def test_an_eager_block_beside_its_compiled_copy_still_merges():
    torch.compiler.reset()
    place = PLACES["pointwise"]
    block, x = made(BUILDERS["mobileone"], place), place.image()
    compiled = torch.compile(in_execution(block, "merged"), backend="aot_eager")
    compiled(x).sum().backward()
    assert_same_step(block, x, "merged")
