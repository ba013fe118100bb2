import pytest
import torch

from repblocks.errors import FoldError
from repblocks.expansion.fitting import deviation, fitted
from repblocks.fusion import AffineConv


def value(kernel, padding, **rest):
    weight = torch.randn(4, 2, *kernel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return AffineConv(weight=weight, bias=torch.ones(4, dtype=torch.float64), padding=padding, **rest)


SMALL = value((3, 3), ((1, 1), (1, 1)))


def test_zero_taps_around_are_taken_off():
    large = value((5, 3), ((2, 2), (1, 1)))
    large.weight[:, :, [0, 4]] = 0
    assert fitted(large, SMALL).equal(large.weight[:, :, 1:4])


def test_taps_are_placed_by_the_padding_in_front():
    shifted = value((5, 3), ((3, 1), (1, 1)))
    shifted.weight[:, :, :2] = 0
    assert fitted(shifted, SMALL).equal(shifted.weight[:, :, 2:])


def test_zero_taps_between_are_taken_out():
    dilated = value((3, 3), ((2, 2), (2, 2)), dilation=(2, 2))
    spread = value((5, 5), ((2, 2), (2, 2)))
    kept = spread.weight[:, :, ::2, ::2].clone()
    spread.weight.zero_()
    spread.weight[:, :, ::2, ::2] = kept
    assert fitted(spread, dilated).equal(kept)


@pytest.mark.parametrize(
    "other",
    [
        value((3, 3), ((1, 0), (1, 1))),
        value((3, 3), ((1, 1), (1, 2))),
        value((3, 3), ((0, 2), (1, 1))),
        value((1, 3), ((0, 0), (1, 1))),
        value((3, 3), ((1, 1), (1, 1)), stride=(1, 2)),
        value((3, 3), ((1, 1), (1, 1)), groups=2),
        value((3, 3), ((1, 1), (1, 1)), padding_mode="reflect"),
    ],
    ids=["a row less", "a column more", "moved", "too small", "stride", "groups", "mode"],
)
def test_another_grid_or_other_pixels_are_refused(other):
    with pytest.raises(FoldError, match="needed the geometry of"):
        fitted(other, SMALL)


def test_a_tap_outside_is_refused():
    with pytest.raises(FoldError, match="reads pixels that"):
        fitted(value((5, 5), ((2, 2), (2, 2))), SMALL)


def test_a_mode_of_padding_that_does_not_pad_is_any():
    inside = value((3, 3), ((0, 0), (0, 0)), padding_mode="reflect")
    assert fitted(inside, value((3, 3), ((0, 0), (0, 0)))).equal(inside.weight)


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_a_deviation_is_relative_to_the_largest_number(size):
    weight = size * SMALL.weight / SMALL.weight.abs().max()
    expected = AffineConv(weight=weight, bias=SMALL.bias * 0, padding=SMALL.padding)
    off = weight.clone()
    off[1, 0, 2, 0] += 0.25 * size
    got = AffineConv(weight=off, bias=expected.bias, padding=SMALL.padding)
    assert deviation(expected, got) == pytest.approx(0.25)


def test_biases_deviate_too_and_none_is_one_of_zeros():
    weight = SMALL.weight / SMALL.weight.abs().max()
    without = AffineConv(weight=weight, padding=SMALL.padding)
    half = AffineConv(weight=weight, bias=torch.full((4,), 0.5, dtype=torch.float64), padding=SMALL.padding)
    assert deviation(without, half) == deviation(half, without) == pytest.approx(0.5)
    assert deviation(half, half) == 0


def test_beside_zeros_a_deviation_is_absolute():
    zeros = AffineConv(weight=torch.zeros_like(SMALL.weight), padding=SMALL.padding)
    tenth = AffineConv(weight=torch.full_like(SMALL.weight, 0.1), padding=SMALL.padding)
    assert deviation(zeros, tenth) == pytest.approx(0.1)
