"""A convolution as a matrix: the law in every layout, the entries one by one, and what is refused."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fusion.laws import assert_same, run
from hypothesis import Phase, given, settings
from strategies import convs_with_input, randn

from repblocks.errors import ConfigurationError, FoldError
from repblocks.fusion import AffineConv, from_linear, matrix
from repblocks.fusion.affine_conv import PADDING_MODES
from repblocks.fusion.matrix import LAYOUTS, output_size, to_matrix


def with_ones(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.flatten(1), x.new_ones(len(x), 1)], dim=1).T


def the_layout_is_the_convolution(layout: str, case) -> None:
    conv, x = case
    product = to_matrix(conv, x.shape[2:], layout=layout) @ with_ones(x)
    assert_same(run(conv, x).flatten(1), product.T)


def the_matrix_is_the_convolution(case) -> None:
    the_layout_is_the_convolution("csr", case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_matrix_times_the_input_is_the_convolution(layout):
    given(convs_with_input())(lambda case: the_layout_is_the_convolution(layout, case))()


def source_pixel(position: int, side: int, mode: str) -> int | None:
    """What a position beyond the border repeats, by the definition of each mode."""
    if 0 <= position < side:
        return position
    if mode == "reflect":
        return -position if position < 0 else 2 * (side - 1) - position
    return {"zeros": None, "replicate": min(max(position, 0), side - 1), "circular": position % side}[mode]


def entries_one_by_one(conv: AffineConv, size: tuple[int, ...]) -> dict[tuple[int, int], float]:
    """The stored entries, by loops over all that can be looped over."""
    out_size, entries = output_size(conv, size), {}
    per_group = conv.weight.shape[1]
    for out, channel in itertools.product(range(conv.out_channels), range(per_group)):
        read = out // (conv.out_channels // conv.groups) * per_group + channel
        for target in itertools.product(*map(range, out_size)):
            row = flat_index((out, *target), (conv.out_channels, *out_size))
            for tap in itertools.product(*map(range, conv.kernel_size)):
                geometry = zip(target, tap, conv.stride, conv.dilation, conv.padding, size, strict=True)
                pixel = [source_pixel(y * s + t * d - p, n, conv.padding_mode) for y, t, s, d, (p, _), n in geometry]
                if None not in pixel:
                    key = row, flat_index((read, *pixel), (conv.in_channels, *size))
                    entries[key] = entries.get(key, 0.0) + conv.weight[(out, channel, *tap)].item()
            if conv.bias is not None:
                entries[row, conv.in_channels * math.prod(size)] = conv.bias[out].item()
    return entries


def flat_index(index, size) -> int:
    position = 0
    for entry, length in zip(index, size, strict=True):
        position = position * length + entry
    return position


def the_entries_are_those_found_one_by_one(case) -> None:
    conv, x = case
    size = tuple(x.shape[2:])
    expected = sorted(entries_one_by_one(conv.promote(len(size)), size).items())
    stored = to_matrix(conv, size, layout="coo")
    assert list(map(tuple, stored.indices().T.tolist())) == [key for key, _ in expected]
    assert torch.allclose(stored.values(), stored.values().new_tensor([v for _, v in expected]), rtol=0, atol=1e-13)


@given(convs_with_input())
def test_exactly_the_entries_found_by_slow_loops_are_stored(case):
    the_entries_are_those_found_one_by_one(case)


@given(convs_with_input())
def test_all_layouts_hold_the_same_entries_and_the_compressed_one_is_sorted(case):
    conv, x = case
    csr, coo, dense = (to_matrix(conv, x.shape[2:], layout=layout) for layout in LAYOUTS)
    arrays = csr.crow_indices(), csr.col_indices(), csr.values()
    torch.sparse_csr_tensor(*arrays, csr.shape, check_invariants=True)
    assert coo.is_coalesced()
    assert torch.equal(coo.values(), csr.values())
    assert torch.equal(csr.to_dense(), dense)
    assert torch.equal(coo.to_dense(), dense)
    assert csr.shape == (conv(x)[0].numel(), x[0].numel() + 1)


@pytest.mark.parametrize(("mode", "last"), [("zeros", [2, 1, 0]), ("replicate", [2, 4, 0]), ("circular", [5, 1, 0])])
def test_taps_on_one_pixel_are_summed_and_taps_in_zero_padding_are_not_stored(mode, last):
    conv = AffineConv(weight=torch.tensor([[[2.0, 1.0, 3.0]]]), padding=((1, 1),), padding_mode=mode)
    matrix = to_matrix(conv, (2,))
    assert matrix.to_dense()[1].tolist() == last
    assert matrix._nnz() == 4


def test_a_kernel_wider_than_a_circular_input_wraps_onto_the_same_pixels():
    conv = AffineConv(weight=randn(0, 1, 1, 9), padding=((4, 4),), padding_mode="circular")
    x = randn(1, 2, 1, 4)
    assert to_matrix(conv, (4,))._nnz() == 16
    the_matrix_is_the_convolution((conv, x))


def test_weights_and_biases_that_happen_to_be_zero_are_stored_and_absent_biases_are_not():
    conv = AffineConv(weight=torch.zeros(4, 1, 3, 3), groups=2)
    assert to_matrix(conv, (5, 4))._nnz() == 4 * 6 * 9
    assert to_matrix(replace(conv, bias=torch.zeros(4)), (5, 4))._nnz() == 4 * 6 * 10


def test_output_pixels_that_see_only_zero_padding_have_empty_rows():
    conv = AffineConv(weight=randn(0, 2, 1, 1), padding=((2, 2),), stride=(3,))
    assert to_matrix(conv, (1,))._nnz() == 0
    the_matrix_is_the_convolution((replace(conv, bias=randn(1, 2)), randn(2, 3, 1, 1)))


def test_a_map_without_spatial_dims_takes_the_rank_of_the_size():
    conv = from_linear(torch.nn.Linear(3, 2, dtype=torch.float64))
    expected = torch.cat([conv.weight, conv.bias.unsqueeze(1)], dim=1)
    assert torch.equal(to_matrix(conv, (), layout="dense"), expected)
    with torch.no_grad():
        the_matrix_is_the_convolution((conv, randn(0, 2, 3, 4, 5, 2)))


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_reach_weight_and_bias_in_every_layout(layout, mode):
    x = with_ones(randn(0, 1, 4, 4, 3))
    geometry = {"padding": ((2, 1), (1, 2)), "stride": (2, 1), "groups": 2, "padding_mode": mode}

    def product(weight, bias):
        return to_matrix(AffineConv(weight=weight, bias=bias, **geometry), (4, 3), layout=layout) @ x

    assert torch.autograd.gradcheck(product, (randn(1, 2, 2, 3, 2).requires_grad_(), randn(2, 2).requires_grad_()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_matrix_keeps_the_dtype(layout, dtype):
    conv = AffineConv(weight=randn(0, 2, 3, 3), bias=randn(1, 2), padding=((1, 1),), padding_mode="replicate")
    assert to_matrix(conv.to(dtype=dtype), (5,), layout=layout).dtype == dtype


def test_an_infinite_weight_does_not_spread_to_other_taps():
    weight = torch.tensor([[[math.inf, 1.0, 1.0]]])
    dense = to_matrix(AffineConv(weight=weight, padding=((1, 1),), padding_mode="replicate"), (4,), layout="dense")
    assert dense[3].tolist() == [0.0, 0.0, math.inf, 2.0, 0.0]


@pytest.mark.slow
def test_the_first_sparse_tensor_of_a_process_does_not_warn():
    program = (
        "import torch; from repblocks.fusion.matrix import to_matrix; from repblocks.fusion import AffineConv;"
        "import warnings; warnings.simplefilter('error');"
        "m = to_matrix(AffineConv(weight=torch.ones(1, 1, 1)), (2,)); m @ torch.ones(3, 1); m.to_dense()"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


PADDED = AffineConv(weight=randn(0, 2, 2, 3, 3), padding=((2, 2), (2, 2)))


@pytest.mark.parametrize(
    ("conv", "size", "message"),
    [
        (PADDED, (2, 8, 8), "needed 2 sizes, one per spatial dim: leave out the batch and the channels"),
        (PADDED, (8,), "needed 2 sizes"),
        (AffineConv(weight=randn(0, 2, 2)), (1, 2, 3, 4), "needed up to 3 sizes"),
        (PADDED, (8, 0), "at least 1"),
        (PADDED, (8, -3), "at least 1"),
        (AffineConv(weight=randn(0, 2, 2, 3, 3), dilation=(1, 2)), (3, 4), "spatial dim 1 .* at least 5"),
        (replace(PADDED, padding_mode="reflect"), (2, 4), "reflect padding of 2 needs at least 3"),
        (replace(PADDED, padding_mode="circular"), (4, 1), "circular padding of 2 needs at least 2"),
    ],
)
def test_a_size_on_which_the_convolution_is_not_defined_is_refused(conv, size, message):
    with pytest.raises(FoldError, match=message):
        to_matrix(conv, size)


@given(convs_with_input())
def test_the_least_size_is_where_torch_begins_to_compute(case):
    conv, x = case
    assert output_size(conv, x.shape[2:]) == tuple(conv(x).shape[2:])
    for dim in range(2, x.ndim):
        assert_refused_with_torch(conv, x, dim)


def assert_refused_with_torch(conv: AffineConv, x: torch.Tensor, dim: int) -> None:
    """Walk one dim down until torch refuses: the size is refused there, and not before."""
    side = x.shape[dim] - 1
    while side and computes(conv, x.narrow(dim, 0, side)):
        output_size(conv, x.narrow(dim, 0, side).shape[2:])
        side -= 1
    with pytest.raises(FoldError):
        output_size(conv, x.narrow(dim, 0, side).shape[2:])


def computes(conv: AffineConv, x: torch.Tensor) -> bool:
    try:
        return bool(conv(x).numel())
    except RuntimeError:
        return False


def test_a_dense_matrix_of_absurd_size_is_refused_with_its_bytes_and_the_way_without_one():
    conv = AffineConv(weight=torch.zeros(256, 256, 3, 3), padding=((1, 1), (1, 1)))
    size = (256 * 56 * 56) * (256 * 56 * 56 + 1) * 4
    with pytest.raises(FoldError, match=rf"takes {size} bytes.*linear_operator\(conv, input_size\)"):
        to_matrix(conv, (56, 56), layout="dense")


def test_an_unknown_layout_is_refused():
    with pytest.raises(ConfigurationError, match="layout='bsr'; needed one of csr, coo, dense"):
        to_matrix(PADDED, (4, 4), layout="bsr")


axes, pixels_read, scaled, with_sums = matrix._axes, matrix._pixels_read, matrix._scaled, matrix._with_sums

MUTANTS = {
    "the bias is dropped": ("_with_bias", lambda pattern, **_: pattern),
    "the padding mode is dropped": (
        "_pixels_read",
        lambda conv, dim, side: pixels_read(replace(conv, padding_mode="zeros"), dim, side),
    ),
    "taps on one pixel are not summed": (
        "_with_sums",
        lambda weight, dim, taps, columns: (
            with_sums(weight, dim, taps[:1], columns[:1])
            if len(columns.unique()) == 1
            else with_sums(weight, dim, taps, columns)
        ),
    ),
    "the axes are in Fortran order": (
        "_scaled",
        lambda tables, sizes: scaled(tables, sizes[::-1]),
    ),
    "the padding before and after are swapped": (
        "_pixels_read",
        lambda conv, dim, side: pixels_read(replace(conv, padding=tuple((q, p) for p, q in conv.padding)), dim, side),
    ),
    "the rows of a grouped kernel are those of the channel before": (
        "_axes",
        lambda conv, size: (
            axes(replace(conv, weight=conv.weight.roll(1, 0)), size) if conv.groups > 1 else axes(conv, size)
        ),
    ),
    "the kernel is flipped": (
        "_pixels_read",
        lambda conv, dim, side: pixels_read(conv, dim, side).flip(1),
    ),
}


@pytest.mark.parametrize("law", [the_matrix_is_the_convolution, the_entries_are_those_found_one_by_one])
@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_law_notices_that(mistake, law, monkeypatch):
    monkeypatch.setattr(matrix, *MUTANTS[mistake])
    only_search = settings(max_examples=300, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        only_search(given(convs_with_input())(law))()
