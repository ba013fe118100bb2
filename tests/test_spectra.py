"""Spectra without a matrix: the adjoint law, and singular values against dense, Fourier and Kronecker oracles."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fusion.laws import assert_same
from hypothesis import Phase, assume, given, settings
from strategies import convs_with_input, randn, seeds

from repblocks import spectra
from repblocks.errors import ConfigurationError, FoldError
from repblocks.fusion import AffineConv, add, dirac, identity
from repblocks.fusion.matrix import to_matrix
from repblocks.spectra import (
    condition,
    effective_rank,
    kernel_report,
    linear_operator,
    spectral_norm,
    spectrum,
)

SAME = ((1, 1), (1, 1))


def circular(seed: int, *shape: int) -> AffineConv:
    padding = tuple((k // 2, (k - 1) // 2) for k in shape[2:])
    return AffineConv(weight=randn(seed, *shape), padding=padding, padding_mode="circular")


def fourier_spectrum(conv: AffineConv, size: tuple[int, ...]) -> torch.Tensor:
    """Of a circular convolution with stride 1: those of the channel matrices, one per frequency."""
    dims = tuple(range(2, 2 + conv.rank))
    transfer = torch.fft.fftn(conv.weight, s=size, dim=dims).flatten(2).movedim(2, 0)
    return torch.linalg.svdvals(transfer).flatten().sort(descending=True).values


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-10 * expected.max()


@given(convs_with_input())
def test_the_operator_is_the_convolution_without_its_bias(case):
    conv, x = case
    operator = linear_operator(conv, x.shape[2:])
    expected = replace(conv, bias=None)(x).flatten(1)
    assert_same(expected, torch.from_numpy(operator @ x.flatten(1).T.numpy()).T)
    assert_same(expected[0], torch.from_numpy(operator @ x[0].flatten().numpy()))


def the_adjoint_is_exact(case, seed) -> None:
    conv, x = case
    operator = linear_operator(conv, x.shape[2:])
    applied = operator @ x[0].flatten().numpy()
    y = randn(seed, *applied.shape).numpy()
    left, right = applied @ y, x[0].flatten().numpy() @ operator.rmatvec(y)
    assert abs(left - right) <= 1e-12 * np.linalg.norm(applied) * np.linalg.norm(y)


@given(convs_with_input(), seeds)
def test_the_adjoint_is_exact_in_every_geometry(case, seed):
    the_adjoint_is_exact(case, seed)


adjoint, padded_pixels = spectra._adjoint, spectra.padded_pixels

MUTANTS = {
    "repeated pixels are cropped": (
        "_unpadded",
        lambda x, dim, pixels, side: x.index_select(dim, (pixels >= 0).nonzero()[:side, 0]),
    ),
    "the padding mode of the adjoint is dropped": (
        "padded_pixels",
        lambda conv, dim, side: padded_pixels(replace(conv, padding_mode="zeros"), dim, side),
    ),
    "the kernel of the adjoint is flipped": (
        "_adjoint",
        lambda conv, size, y: adjoint(replace(conv, weight=conv.weight.flip(2)), size, y),
    ),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_the_adjoint_law_notices_that(mistake, monkeypatch):
    monkeypatch.setattr(spectra, *MUTANTS[mistake])
    only_search = settings(max_examples=300, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        only_search(given(convs_with_input(), seeds)(the_adjoint_is_exact))()


@given(convs_with_input())
def test_the_operator_and_its_adjoint_are_the_matrix_and_its_transpose(case):
    conv, x = case
    dense = to_matrix(conv, x.shape[2:], layout="dense")[:, :-1]
    operator = linear_operator(conv, x.shape[2:])
    assert operator.shape == dense.shape
    assert operator.dtype == np.float64
    assert_same(dense, torch.from_numpy(operator @ np.eye(dense.shape[1])))
    assert_same(dense.T, torch.from_numpy(operator.T @ np.eye(dense.shape[0])))


def test_the_operator_keeps_a_copy_of_the_weight_and_works_in_float64():
    conv = AffineConv(weight=randn(0, 2, 2, 3).float().requires_grad_(), padding=((1, 1),))
    operator = linear_operator(conv, (5,))
    before = operator @ np.ones(10)
    with torch.no_grad():
        conv.weight.zero_()
    assert before.dtype == np.float64
    assert np.array_equal(operator @ np.ones(10), before)


def test_the_operator_works_under_inference_mode_and_refuses_complex_vectors():
    with torch.inference_mode():
        operator = linear_operator(circular(0, 2, 2, 3), (5,))
        operator.rmatvec(operator @ np.ones(10))
    with pytest.raises(TypeError, match="complex"):
        operator @ np.full(10, 1j)


@given(convs_with_input())
def test_the_spectrum_is_that_of_the_dense_matrix(case):
    conv, x = case
    dense = to_matrix(conv, x.shape[2:], layout="dense")[:, :-1].numpy()
    expected = torch.from_numpy(np.linalg.svd(dense, compute_uv=False).copy())
    assert_close(spectrum(conv, x.shape[2:], min(dense.shape)), expected)
    assert spectral_norm(conv, x.shape[2:]) == pytest.approx(expected[0].item(), rel=1e-10)


@given(convs_with_input())
def test_lanczos_finds_the_largest_values_of_the_dense_matrix(case):
    conv, x = case
    dense = to_matrix(conv, x.shape[2:], layout="dense")[:, :-1]
    assume(min(dense.shape) > 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "DENSE_SIDE", 0)
        assert_close(spectrum(conv, x.shape[2:], 3), torch.linalg.svdvals(dense)[:3])


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 5, 4), (9,)), ((4, 2, 3, 2), (5, 6)), ((2, 3, 2, 3, 2), (4, 3, 4)), ((16, 16, 3, 3), (9, 8))],
)
def test_the_spectrum_of_a_circular_convolution_has_the_fourier_form(shape, size):
    conv = circular(3, *shape)
    expected = fourier_spectrum(conv, size)
    assert_close(spectrum(conv, size, 6), expected[:6])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_lanczos_does_not_depend_on_the_scale(scale):
    conv = circular(3, 16, 16, 3, 3)
    scaled = replace(conv, weight=scale * conv.weight)
    assert_close(spectrum(scaled, (8, 8), 4), scale * fourier_spectrum(conv, (8, 8))[:4])


def every_copy_of_a_multiple_value_is_found(padding_mode: str) -> None:
    """A kernel that does not reach across columns has every value once per column."""
    column = AffineConv(weight=randn(0, 16, 16, 3), padding=((1, 1),), padding_mode=padding_mode)
    conv = replace(column, weight=column.weight[..., None], stride=(1, 1), padding=((1, 1), (0, 0)), dilation=(1, 1))
    once = torch.linalg.svdvals(to_matrix(column, (5,), layout="dense")[:, :-1])
    assert_close(spectrum(conv, (5, 7), 10), once.repeat_interleave(7).sort(descending=True).values[:10])


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_lanczos_finds_every_copy_of_a_multiple_value(padding_mode):
    every_copy_of_a_multiple_value_is_found(padding_mode)


def test_lanczos_misses_copies_unless_it_searches_again(monkeypatch):
    monkeypatch.setattr(spectra, "_deflated", lambda operator, values, vectors: 1e-9 * operator)
    with pytest.raises(AssertionError):
        every_copy_of_a_multiple_value_is_found("circular")


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_lanczos_finds_true_zeros_where_the_rank_is_low(rank, k):
    diagonal = torch.zeros(600, dtype=torch.float64)
    diagonal[:rank] = 1
    expected = (torch.arange(k) < rank).double()
    assert (spectrum(AffineConv(weight=diagonal.diag()), (), k) - expected).abs().max() <= 1e-12
    mixed = AffineConv(weight=(randn(0, 600, max(rank, 1)) @ randn(1, max(rank, 1), 600)))
    assert_close(spectrum(mixed, (), k), torch.linalg.svdvals(mixed.weight)[:k])


def test_an_operator_is_zero_where_all_taps_lie_in_the_padding():
    conv = AffineConv(weight=randn(0, 600, 600, 1), padding=((2, 2),), stride=(3,))
    assert not spectrum(conv, (1,), 3).any()
    assert spectral_norm(conv, (1,)) == 0
    assert effective_rank(conv, (1,)) == 0


def test_lanczos_finds_the_equal_values_of_the_identity():
    assert_close(spectrum(dirac(40, (3, 3), dtype=torch.float64), (4, 5), 6), torch.ones(6, dtype=torch.float64))


def kronecker_conv(channels: int, decay: float) -> tuple[AffineConv, torch.Tensor]:
    """Channel mixing with singular values ``decay ** n``, times a separable window."""
    left, right = (torch.linalg.qr(randn(seed, channels, channels)).Q for seed in (0, 1))
    values = decay ** torch.arange(channels, dtype=torch.float64)
    window = torch.outer(randn(2, 3), randn(3, 3))
    mixing = left * values @ right
    return AffineConv(weight=mixing[:, :, None, None] * window, padding=SAME), values


def kronecker_spectrum(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    sides = [
        torch.linalg.svdvals(
            to_matrix(AffineConv(weight=randn(seed, 3)[None, None], padding=((1, 1),)), (n,), layout="dense")
        )
        for seed, n in zip((2, 3), size, strict=True)
    ]
    return torch.kron(values, torch.kron(*sides)).sort(descending=True).values


def test_a_separable_kernel_has_the_products_of_its_factors_values():
    conv, values = kronecker_conv(16, 0.7)
    assert_close(spectrum(conv, (9, 10), 6), kronecker_spectrum(values, (9, 10))[:6])


@pytest.mark.slow
def test_a_layer_of_256_channels_on_56x56_needs_no_matrix(monkeypatch):
    monkeypatch.setattr(spectra, "LANCZOS_VECTORS", 24)
    conv, values = kronecker_conv(256, 0.5)
    expected = kronecker_spectrum(values[:1], (56, 56))[0].item()
    assert spectral_norm(conv, (56, 56), tolerance=1e-2) == pytest.approx(expected, rel=5e-3)


def test_the_condition_of_an_orthogonal_map_is_one_and_of_a_singular_one_infinite():
    orthogonal = AffineConv(weight=torch.linalg.qr(randn(0, 4, 4)).Q)
    assert condition(orthogonal, (3, 2)) == pytest.approx(1)
    singular = AffineConv(weight=randn(0, 4, 1) * randn(1, 1, 4))
    assert condition(singular, (3, 2)) == math.inf
    assert condition(AffineConv(weight=torch.zeros(2, 2)), ()) == math.inf


@pytest.mark.parametrize("size", [(5,), (8,)])
def test_the_condition_is_numpys(size):
    conv = AffineConv(weight=randn(0, 3, 3, 3), padding=((1, 1),))
    dense = to_matrix(conv, size, layout="dense")[:, :-1].numpy()
    assert condition(conv, size) == pytest.approx(np.linalg.cond(dense), rel=1e-9)


def test_the_effective_rank_counts_equal_values_and_ignores_scale():
    conv = AffineConv(weight=torch.diag(torch.tensor([3.0, 3.0, 3.0, 0.0])))
    assert effective_rank(conv, ()) == pytest.approx(3)
    assert effective_rank(conv, (2, 2)) == pytest.approx(12)
    uneven = AffineConv(weight=torch.diag(torch.tensor([3.0, 1.0])))
    assert effective_rank(uneven, ()) == pytest.approx(4 / 27**0.25)
    assert effective_rank(AffineConv(weight=torch.zeros(2, 2)), ()) == 0


def test_energy_per_tap_shows_the_skeleton():
    weight = torch.zeros(2, 2, 3, 3)
    weight[..., 1, :] = 1
    weight[..., 1, 1] = 2
    report = kernel_report(AffineConv(weight=weight, padding=SAME), (4, 4))
    assert report.tap_energy == pytest.approx([0, 0, 0, 1 / 6, 4 / 6, 1 / 6, 0, 0, 0])
    assert "  16.7   66.7   16.7" in str(report)


def test_a_report_of_branches_describes_their_sum_and_their_norms():
    branches = {
        "3x3": AffineConv(weight=randn(0, 4, 4, 3, 3), bias=randn(1, 4), padding=SAME),
        "1x1": AffineConv(weight=randn(2, 4, 4, 1, 1)),
        "identity": identity(4, dtype=torch.float64),
    }
    report = kernel_report(branches, (5, 6))
    merged = kernel_report(add(*branches.values()), (5, 6))
    assert report.branch_norms == pytest.approx({name: conv.weight.norm().item() for name, conv in branches.items()})
    assert replace(report, branch_norms={}) == merged
    assert report.singular_values == pytest.approx(spectrum(add(*branches.values()), (5, 6)).tolist())
    assert all(line.split()[0] in branches for line in str(report).splitlines()[6:9])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel_size", [(3, 3), (2, 4), (1, 5)])
def test_the_identity_kernel_is_at_distance_zero_and_twice_it_at_one(kernel_size, groups):
    conv = dirac(4, kernel_size, groups)
    assert kernel_report(conv, (5, 5)).identity_distance == 0
    assert kernel_report(replace(conv, weight=2 * conv.weight), (5, 5)).identity_distance == pytest.approx(1)


def test_the_identity_reads_the_output_pixel_wherever_the_padding_puts_it():
    weight = torch.zeros(3, 3, 3, 3)
    weight[range(3), range(3), 2, 0] = 1
    report = kernel_report(AffineConv(weight=weight, padding=((2, 0), (0, 2))), (5, 5))
    assert report.identity_distance == 0


def test_small_weights_and_large_ones_in_half_precision_have_shares_and_norms():
    small = kernel_report(AffineConv(weight=1e-6 * torch.ones(2, 2, 3, 3), padding=SAME), (5, 5))
    assert small.tap_energy == pytest.approx([1 / 9] * 9)
    large = AffineConv(weight=torch.full((2, 2, 1, 1), 6e4).half())
    report = kernel_report({"large": large, "zero": replace(large, weight=0 * large.weight)}, (5, 5))
    assert report.branch_norms == {"large": pytest.approx(2 * 6e4, rel=1e-3), "zero": 0}


def test_an_operator_keeps_the_weights_it_was_made_of():
    conv = AffineConv(weight=randn(0, 2, 2, 3, 3), padding=SAME)
    operator, x = linear_operator(conv, (5, 5)), np.ones(50)
    before = operator @ x
    conv.weight.zero_()
    assert np.array_equal(operator @ x, before)


@pytest.mark.parametrize(
    "conv",
    [
        AffineConv(weight=torch.ones(2, 3, 1, 1)),
        AffineConv(weight=torch.ones(2, 2, 3, 3)),
        AffineConv(weight=torch.ones(2, 2, 3, 3), padding=SAME, stride=(1, 2)),
        AffineConv(weight=torch.ones(2, 2, 2, 2), padding=((1, 1), (1, 1)), dilation=(2, 2)),
    ],
    ids=["channels", "smaller grid", "stride", "no tap on the output pixel"],
)
def test_no_distance_is_given_where_no_kernel_of_the_shape_is_the_identity(conv):
    report = kernel_report(conv, (5, 5))
    assert report.identity_distance is None
    assert "none has this shape" in str(report)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_a_report_of_any_rank_can_be_read_and_written(rank):
    conv = AffineConv(weight=randn(0, 3, 2, *(2,) * rank))
    report = kernel_report(conv, (4,) * rank)
    assert json.loads(json.dumps(report.to_dict()))["tap_energy"] == list(report.tap_energy)
    assert sum(report.tap_energy) == pytest.approx(1)
    assert len(report.singular_values) == min(6, 3 * 3**rank, 2 * 4**rank)
    assert len(str(report).splitlines()) == 4 + {0: 1, 1: 1, 2: 2, 3: 5}[rank]


def test_a_zero_kernel_has_no_energy():
    assert not any(kernel_report(AffineConv(weight=torch.zeros(2, 2, 3)), (4,)).tap_energy)


@pytest.mark.parametrize("k", [0, -1, 9])
def test_there_are_only_so_many_singular_values(k):
    with pytest.raises(ConfigurationError, match="has 8 singular values: ask for 1 to 8"):
        spectrum(AffineConv(weight=randn(0, 2, 3)), (4,), k)


@pytest.mark.parametrize("function", [condition, effective_rank])
def test_a_whole_spectrum_of_absurd_size_is_refused(function):
    with pytest.raises(FoldError, match=r"has 802816 singular values.*call spectrum"):
        function(AffineConv(weight=torch.zeros(256, 256)), (56, 56))


@pytest.mark.parametrize(
    "function", [linear_operator, spectrum, spectral_norm, condition, effective_rank, kernel_report]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(function, value):
    with pytest.raises(FoldError, match="infinite or NaN"):
        function(AffineConv(weight=torch.full((1, 1, 1), value)), (4,))


@pytest.mark.parametrize(
    "function", [linear_operator, spectrum, spectral_norm, condition, effective_rank, kernel_report]
)
def test_an_input_smaller_than_the_kernel_is_refused(function):
    with pytest.raises(FoldError, match="smaller than its kernel"):
        function(AffineConv(weight=randn(0, 1, 1, 3)), (2,))


def test_a_report_needs_at_least_one_branch():
    with pytest.raises(FoldError, match="at least one"):
        kernel_report({}, (4, 4))
