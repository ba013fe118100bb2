"""Every law of the algebra on drawn geometries, in float64."""

from dataclasses import replace

import pytest
from fusion import laws
from fusion.laws import assert_same, run_chain
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    any_pairs,
    branches_then_conv,
    chains,
    conv_then_branches,
    convs_with_input,
    diracs,
    grown_kernels,
    parallel,
    randn,
    repeated_pairs,
    seeds,
    shortcut_chains,
    smallest_input,
    uncovered_pairs,
    ungroupings,
)

from repblocks.errors import FoldError
from repblocks.fusion import AffineConv, add, compose


@given(convs_with_input())
def test_a_value_computes_what_torch_computes_with_its_tensors_and_geometry(case):
    conv, x = case
    laws.assert_value_is(conv, x, laws.run(conv, x))


@given(chains())
def test_compose_is_the_chain(case):
    laws.compose_is_the_chain(case)


@given(any_pairs())
def test_compose_is_exact_or_refuses(case):
    laws.compose_is_exact_or_refuses(case)


@given(st.one_of(uncovered_pairs(), repeated_pairs()), seeds)
def test_compose_refuses_only_what_a_merge_gets_wrong_at_the_border(pair, seed):
    first, second = pair
    with pytest.raises(FoldError, match="move the padding to the first conv"):
        compose(first, second)
    merged = merged_regardless(first, second)
    assert any(differ(pair, merged, x) for x in inputs_of_every_phase(pair, merged, seed))


def merged_regardless(first: AffineConv, second: AffineConv) -> AffineConv:
    """The merge that ignores the border: right inside, padded as far as the chain pads."""
    inside = compose(first, replace(second, padding=((0, 0),) * second.rank))
    sides = zip(first.padding, first.stride, second.padding, strict=True)
    padding = tuple((p1[0] + s * p2[0], p1[1] + s * p2[1]) for p1, s, p2 in sides)
    return replace(inside, padding=padding, padding_mode=second.padding_mode)


def inputs_of_every_phase(pair, merged: AffineConv, seed: int):
    rank = merged.rank
    least = list(map(max, smallest_input(*pair, rank=rank), smallest_input(merged, rank=rank)))
    for extra in range(max(pair[0].stride)):
        yield randn(seed, 2, merged.in_channels, *(n + extra for n in least))


def differ(pair, merged: AffineConv, x) -> bool:
    expected, got = run_chain(pair, x), laws.run(merged, x)
    assert got.shape == expected.shape
    return bool((expected - got).abs().max() > 1e-6 * expected.abs().max())


@given(chains(length=3))
def test_compose_is_associative(case):
    (a, b, c), x = case
    expected = run_chain((a, b, c), x)
    laws.assert_value_is(compose(compose(a, b), c), x, expected)
    laws.assert_value_is(compose(a, compose(b, c)), x, expected)


@given(convs_with_input())
def test_identity_is_the_unit_of_compose(case):
    laws.identity_is_the_unit(case)


@given(parallel())
def test_add_is_the_sum_of_the_branches(case):
    laws.add_is_the_sum(case)


@given(parallel(count=2))
def test_add_is_commutative(case):
    (a, b), x = case
    assert_same(add(a, b)(x), add(b, a)(x))


@given(parallel(count=3))
def test_add_is_associative(case):
    (a, b, c), x = case
    assert_same(add(a, add(b, c))(x), add(add(a, b), c)(x))


@given(branches_then_conv())
def test_a_conv_without_bias_distributes_over_the_sum_before_it(case):
    (a, b), after, x = case
    assert_same(compose(add(a, b), after)(x), add(compose(a, after), compose(b, after))(x))


@given(conv_then_branches())
def test_branches_distribute_over_the_conv_before_them(case):
    before, (a, b), x = case
    assert_same(compose(before, add(a, b))(x), add(compose(before, a), compose(before, b))(x))


@given(parallel(same_out=False))
def test_concat_is_the_concatenation_of_the_branches(case):
    laws.concat_is_the_concatenation(case)


@given(parallel())
def test_interleave_alternates_the_channels_of_the_branches_and_keeps_their_groups(case):
    laws.interleave_alternates_the_channels(case)


@given(parallel(same_in=False, same_out=False))
def test_split_concat_gives_every_branch_its_own_slice(case):
    laws.split_concat_reads_slices(case)


@given(grown_kernels())
def test_pad_kernel_changes_nothing(case):
    laws.pad_kernel_changes_nothing(case)


@given(ungroupings())
def test_ungroup_changes_nothing(case):
    laws.ungroup_changes_nothing(case)


@given(diracs())
def test_dirac_changes_nothing(case):
    laws.dirac_changes_nothing(case)


@given(shortcut_chains())
def test_the_shortcut_is_absorbed(case):
    laws.the_shortcut_is_absorbed(case)
