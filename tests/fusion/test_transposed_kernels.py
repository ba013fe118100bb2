"""Chains and branches with transposed convolutions: exact, or refused because merging would be wrong."""

import contextlib
import math

import pytest
import torch
from fusion.laws import assert_same
from fusion.transposed_cases import (
    assert_value_is,
    branches,
    chains,
    clean_chains,
    convs_with_input,
    run,
    run_chain,
    up,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from strategies import divisors, randn, seeds
from torch import Tensor
from torch.utils import _pytree as pytree

from repblocks.errors import FoldError
from repblocks.fusion import (
    AffineConv,
    AffineConvTranspose,
    add,
    compose,
    concat,
    interleave,
    pad_kernel,
    scale,
    split_concat,
    transposed,
    transposed_kernels,
    ungroup,
)

mirrored, swapped = transposed_kernels._mirrored, transposed._swapped


@given(chains())
def test_a_chain_with_a_transposed_conv_is_exact_or_refused_because_merging_would_be_wrong(case):
    chain, x = case
    expected = run_chain(chain, x)
    try:
        merged = compose(*chain)
    except FoldError:
        regardless = merged_regardless(*chain)
        inputs = [x, *(randn(1, *x.shape[:2], *(n + extra for n in x.shape[2:])) for extra in (1, 2))]
        assert any(differ(run(regardless, y), run_chain(chain, y)) for y in inputs)
    else:
        assert_value_is(merged, x, expected)


def merged_regardless(first, second) -> AffineConvTranspose:
    """The merge that ignores the border: right inside, where there is no bias before upsampling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transposed_kernels, "_require_clean_border", lambda *_: None)
        return compose(first, second)


def differ(got: Tensor, expected: Tensor) -> bool:
    assert got.shape == expected.shape
    return bool((got - expected).abs().max() > 1e-6 * expected.abs().max())


@given(clean_chains(length=3))
def test_compose_of_transposed_convs_is_associative(case):
    (a, b, c), x = case
    expected = run_chain((a, b, c), x)
    assert_value_is(compose(compose(a, b), c), x, expected)
    assert_value_is(compose(a, compose(b, c)), x, expected)


@given(convs_with_input(), st.booleans(), seeds)
def test_a_batch_norm_or_pointwise_conv_behind_any_transposed_conv_folds_into_it(case, diagonal, seed):
    conv, x = case
    channels = conv.out_channels
    behind = AffineConv(
        weight=randn(seed, channels, 1 if diagonal else channels),
        bias=randn(seed + 1, channels),
        groups=channels if diagonal else 1,
    )
    merged = compose(conv, behind)
    assert (merged.kernel_size, merged.stride, merged.padding) == (conv.kernel_size, conv.stride, conv.padding)
    assert merged.groups == (conv.groups if diagonal else 1)
    assert_value_is(merged, x, run_chain((conv, behind), x))


@given(convs_with_input(), seeds)
def test_a_scale_before_any_transposed_conv_folds_into_it(case, seed):
    conv, x = case
    gamma = scale(randn(seed, conv.in_channels))
    assert_value_is(compose(gamma, conv), x, run_chain((gamma, conv), x))


@pytest.mark.parametrize(
    ("padding", "stride", "folds"), [(2, 1, True), (3, 1, True), (1, 1, False), (2, 2, False), (0, 1, False)]
)
def test_a_shift_before_a_transposed_conv_folds_only_where_every_output_pixel_gets_all_taps(padding, stride, folds):
    shift = AffineConv(weight=randn(1, 3, 1), bias=randn(2, 3), groups=3)
    conv = AffineConvTranspose(weight=randn(3, 3, 2, 3), stride=(stride,), padding=((padding, padding),))
    if folds:
        x = randn(4, 2, 3, 9)
        assert_value_is(compose(shift, conv), x, run_chain((shift, conv), x))
    else:
        with pytest.raises(FoldError, match="reaches its output pixels unequally; put the bias or BatchNorm behind it"):
            compose(shift, conv)


@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (2, 2), (2, 4)])
def test_pixels_that_the_first_leaves_empty_may_be_cut_off_before_the_second_reads_there(taps, dilation):
    first = up(3, 2, taps, stride=(3,), dilation=(dilation,), padding=((2, 2),))
    second, x = up(2, 3, 3, seed=2, padding=((1, 1),)), randn(3, 3, 3, 5)
    assert_value_is(compose(first, second), x, run_chain((first, second), x))


@given(branches())
def test_parallel_transposed_branches_add(case):
    convs, x = case
    merged = add(*convs)
    assert merged.groups == math.gcd(*(conv.groups for conv in convs))
    assert_value_is(merged, x, sum(run(conv, x) for conv in convs))


@given(branches(same_out=False))
def test_parallel_transposed_branches_concatenate(case):
    convs, x = case
    assert_value_is(concat(*convs), x, torch.cat([run(conv, x) for conv in convs], dim=1))


@given(branches())
def test_parallel_transposed_branches_interleave(case):
    convs, x = case
    assert_value_is(interleave(*convs), x, torch.stack([run(conv, x) for conv in convs], dim=2).flatten(1, 2))


@given(branches(same_in=False, same_out=False))
def test_transposed_branches_read_their_own_slices(case):
    convs, x = case
    slices = x.split([conv.in_channels for conv in convs], dim=1)
    expected = torch.cat([run(conv, part) for conv, part in zip(convs, slices, strict=True)], dim=1)
    assert_value_is(split_concat(*convs), x, expected)


@given(convs_with_input(), st.integers(0, 3))
def test_growing_a_transposed_kernel_changes_nothing(case, growth):
    conv, x = case
    kernel_size = tuple(k + growth for k in conv.kernel_size)
    grown = pad_kernel(conv, kernel_size)
    assert grown.kernel_size == kernel_size
    assert_value_is(grown, x, run(conv, x))


@given(convs_with_input(), st.data())
def test_ungrouping_a_transposed_conv_changes_nothing(case, data):
    conv, x = case
    groups = data.draw(st.sampled_from(divisors(conv.groups)))
    dense = ungroup(conv, groups)
    assert dense.groups == groups
    assert_value_is(dense, x, run(conv, x))


def test_dilated_branches_aligned_to_each_other_stay_dilated():
    merged = add(up(2, 2, 3, dilation=(2,), padding=((2, 2),)), up(2, 2, 2, dilation=(4,), padding=((2, 2),)))
    assert (merged.kernel_size, merged.dilation) == ((3,), (2,))


@pytest.mark.parametrize(
    ("combine", "reason"),
    [
        (lambda: add(up(2, 2, 3), up(2, 2, 3, stride=(2,))), r"add AffineConvTranspose.* stride differ; every branch"),
        (lambda: add(up(2, 2, 3), up(2, 2, 2)), r"add AffineConvTranspose.* output grids .* differ"),
        (lambda: add(up(2, 2, 3), up(3, 2, 3)), r"add AffineConvTranspose.* in_channels differ"),
        (lambda: add(up(2, 2, 3), up(2, 3, 3)), r"add AffineConvTranspose.* out_channels differ"),
        (lambda: concat(up(2, 2, 3), up(3, 2, 3)), r"concat AffineConvTranspose.* in_channels differ"),
        (lambda: interleave(up(2, 2, 3), up(3, 2, 3)), r"interleave AffineConvTranspose.* in_channels differ"),
        (lambda: interleave(up(2, 2, 3), up(2, 3, 3)), r"interleave AffineConvTranspose.* out_channels differ"),
        (lambda: add(up(2, 2, 3), up(2, 2, 3, 3)), "numbers of spatial dims differ"),
        (
            lambda: compose(up(2, 3, 3), up(2, 3, 3)),
            r"with AffineConvTranspose.*: the first writes 3 channels, the second reads 2",
        ),
        (
            lambda: compose(up(2, 3, 3), AffineConv(weight=randn(1, 2, 3, 3), stride=(2,))),
            "only a convolution of stride 1, padded by zeros or not at all",
        ),
        (
            lambda: compose(
                AffineConv(weight=randn(1, 2, 2, 3), padding=((1, 1),), padding_mode="reflect"), up(2, 3, 3)
            ),
            "only a convolution of stride 1, padded by zeros or not at all",
        ),
        (
            lambda: compose(up(2, 2, 3, padding=((1, 1),)), up(2, 2, 3)),
            "pixels that the first computes and cuts off; move the cut to the second",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(combine, reason):
    with pytest.raises(FoldError, match=reason):
        combine()


def folded_chain(w: Tensor, b: Tensor, v: Tensor, g: Tensor) -> AffineConvTranspose:
    first = AffineConvTranspose(weight=w, stride=(2, 1), groups=2)
    second = AffineConvTranspose(weight=v, bias=b, stride=(1, 2), padding=((1, 0), (-1, 1)))
    return add(compose(compose(first, second), scale(g)), compose(first, second))


def chain_tensors() -> list[Tensor]:
    shapes = [(4, 1, 2, 2), (3,), (2, 3, 2, 3), (3,)]
    return [randn(seed, *shape).requires_grad_() for seed, shape in enumerate(shapes)]


def test_gradients_flow_through_chains_and_branches():
    assert torch.autograd.gradcheck(lambda *given: tuple(pytree.tree_leaves(folded_chain(*given))), chain_tensors())


def test_batches_of_weights_fold_at_once():
    given = [tensor.detach() for tensor in chain_tensors()]
    stacked = [torch.stack([2 * tensor, tensor]) for tensor in given]
    batched = torch.func.vmap(lambda *t: tuple(pytree.tree_leaves(folded_chain(*t))))(*stacked)
    for one, many in zip(pytree.tree_leaves(folded_chain(*given)), batched, strict=True):
        assert_same(one, many[1])


def assert_chain(case) -> None:
    chain, x = case
    assert_value_is(compose(*chain), x, run_chain(chain, x))


def assert_sum(case) -> None:
    convs, x = case
    assert_value_is(add(*convs), x, sum(run(conv, x) for conv in convs))


def backwards(padding):
    return tuple((after, before) for before, after in padding)


MUTANTS = {
    "the taps are not reversed": (
        (transposed, "_swapped", lambda weight, groups: swapped(weight, groups).flip(tuple(range(2, weight.ndim)))),
        (assert_sum, branches()),
    ),
    "the groups are swapped as one": (
        (
            transposed,
            "_swapped",
            lambda weight, groups: swapped(weight, 1).reshape(swapped(weight, groups).shape),
        ),
        (assert_sum, branches()),
    ),
    "the sides are exchanged": (
        (transposed_kernels, "_mirrored", lambda *given: backwards(mirrored(*given))),
        (assert_sum, branches()),
    ),
    "the border is not looked at": (
        (transposed_kernels, "_require_clean_border", lambda *_: None),
        (assert_chain, chains()),
    ),
    "every bias spreads evenly": (
        (transposed_kernels, "_pixels_read_beyond", lambda *_: 0),
        (assert_chain, chains()),
    ),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_law_notices_that(mistake, monkeypatch):
    patch, (law, cases) = MUTANTS[mistake]
    monkeypatch.setattr(*patch)

    def exact_or_refused(case) -> None:
        with contextlib.suppress(FoldError):
            law(case)

    only_search = settings(max_examples=300, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        only_search(given(cases)(exact_or_refused))()
