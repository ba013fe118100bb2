"""Single kernels: the seeds' examples, the exact border, and what each refuses in which words."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fusion.laws import assert_same, assert_value_is, run, run_chain
from strategies import randn
from torch import nn

from repblocks.errors import FoldError
from repblocks.fusion import (
    AffineConv,
    add,
    compose,
    concat,
    dirac,
    fold,
    identity,
    interleave,
    pad_kernel,
    split_concat,
    ungroup,
)


def conv2d(
    read: int, written: int, kernel_size=(1, 1), *, bias: bool = False, padding: int = 0, **geometry
) -> AffineConv:
    return AffineConv(
        weight=randn(1, written, read // geometry.get("groups", 1), *kernel_size),
        bias=randn(2, written) if bias else None,
        padding=((padding, padding),) * 2,
        **geometry,
    )


def test_two_fully_padded_convs_of_900_and_5000_parameters_become_one_of_98():
    first = nn.Conv2d(1, 100, 3, padding=2, bias=False).double()
    second = nn.Conv2d(100, 2, 5, padding=4, bias=False).double()
    assert (first.weight.numel(), second.weight.numel()) == (900, 5000)
    merged = compose(fold(first), fold(second)).to_module()
    assert (merged.weight.shape, merged.padding) == ((2, 1, 7, 7), (6, 6))
    assert sum(parameter.numel() for parameter in merged.parameters()) == 98
    x = 10 * randn(0, 1, 1, 6, 6)
    assert_same(second(first(x)).detach(), merged(x).detach())


@pytest.mark.parametrize(
    ("first", "second", "kernel_size", "stride", "dilation", "groups"),
    [
        (conv2d(4, 4, (3, 3)), conv2d(4, 4), (3, 3), (1, 1), (1, 1), 1),
        (conv2d(4, 4), conv2d(4, 4, (3, 5), dilation=(2, 1)), (3, 5), (1, 1), (2, 1), 1),
        (conv2d(4, 4, (3, 3), stride=(2, 1)), conv2d(4, 4, (2, 3)), (5, 5), (2, 1), (1, 1), 1),
        (conv2d(4, 4, (3, 2), dilation=(2, 2)), conv2d(4, 4, (2, 2), dilation=(4, 3)), (5, 6), (1, 1), (2, 1), 1),
        (conv2d(4, 4, (3, 3), groups=4), conv2d(4, 8, (3, 3), groups=2), (5, 5), (1, 1), (1, 1), 2),
        (conv2d(4, 4, stride=(2, 2)), conv2d(4, 4, (3, 3), padding=1), (3, 3), (2, 2), (2, 2), 1),
        (conv2d(12, 12, groups=6), conv2d(12, 12, groups=4), (1, 1), (1, 1), (1, 1), 2),
    ],
)
def test_the_merged_geometry_of_a_chain(first, second, kernel_size, stride, dilation, groups):
    merged = compose(first, second)
    assert (merged.kernel_size, merged.stride, merged.dilation, merged.groups) == (
        kernel_size,
        stride,
        dilation,
        groups,
    )
    x = randn(3, 2, first.in_channels, 15, 14)
    assert_value_is(merged, x, run_chain((first, second), x))


@pytest.mark.parametrize(
    ("before", "after", "stride", "exact"),
    [
        (2, 2, 1, True),
        (1, 2, 1, False),
        (2, 1, 1, False),
        (1, 2, 2, True),
        (0, 2, 2, False),
        (0, 2, 3, True),
        (0, 1, 3, False),
        (5, 4, 1, True),
    ],
)
def test_zero_padding_after_a_conv_is_exact_only_where_the_conv_gives_zeros_by_itself(before, after, stride, exact):
    first = AffineConv(weight=randn(1, 3, 2, 3), padding=((before, after),), stride=(stride,))
    second = AffineConv(weight=randn(2, 2, 3, 2), padding=((1, 1),))
    if exact:
        for size in (9, 10, 11):
            x = randn(3, 2, 2, size)
            assert_value_is(compose(first, second), x, run_chain((first, second), x))
    else:
        with pytest.raises(FoldError, match="the zeros stand where the first kernel would still see the input"):
            compose(first, second)


@pytest.mark.parametrize("sides", [(1, 0), (0, 1)], ids=["before", "after"])
def test_only_the_side_that_is_zero_padded_needs_zeros_from_the_first_conv(sides):
    first = AffineConv(weight=randn(1, 3, 2, 3), padding=(tuple(2 * side for side in sides),))
    second = AffineConv(weight=randn(2, 5, 3, 2), padding=(sides,))
    x = randn(3, 3, 2, 9)
    assert_value_is(compose(first, second), x, run_chain((first, second), x))


def test_the_padding_mode_of_a_first_conv_that_does_not_pad_is_no_obstacle_to_zero_padding():
    first, second = conv2d(3, 4, padding_mode="reflect"), conv2d(4, 5, (3, 2), padding=1)
    x = randn(3, 3, 3, 6, 5)
    assert_value_is(compose(first, second), x, run_chain((first, second), x))


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (
            conv2d(3, 4, bias=True),
            conv2d(4, 4, (3, 3), padding=1),
            "zero padding after a bias is not a convolution at the border",
        ),
        (
            conv2d(3, 4, (3, 3), padding=1),
            conv2d(4, 4, (3, 3), padding=1),
            "the zeros stand where the first kernel would still see the input",
        ),
        (
            conv2d(3, 4, (3, 3), padding=1, padding_mode="reflect"),
            conv2d(4, 4, (3, 3), padding=1),
            "reflect padding before zero padding is not one padding",
        ),
        (
            conv2d(3, 4, (3, 3)),
            conv2d(4, 4, (3, 3), padding=1, padding_mode="circular"),
            "circular padding commutes with an unpadded pointwise map",
        ),
        (
            conv2d(3, 4, stride=(2, 2)),
            conv2d(4, 4, (3, 3), padding=1, padding_mode="replicate"),
            "replicate padding commutes",
        ),
    ],
)
def test_a_refusal_at_the_border_names_both_convs_the_reason_and_the_remedy(first, second, reason):
    with pytest.raises(FoldError) as raised:
        compose(first, second)
    message = str(raised.value)
    assert message.startswith(f"cannot compose {first!r} with {second!r}: {reason}")
    assert "move the padding to the first conv" in message


def test_moving_the_padding_to_the_first_conv_is_the_remedy():
    first, second = conv2d(3, 4, bias=True), conv2d(4, 4, (3, 3), padding=1)
    moved = replace(first, padding=second.padding), replace(second, padding=())
    x = randn(3, 2, 3, 6, 5)
    assert_value_is(compose(*moved), x, run_chain(moved, x))


def test_merging_a_biased_pointwise_conv_with_a_padded_one_would_be_wrong_at_the_border_only():
    first, second = conv2d(3, 4, bias=True), conv2d(4, 4, (3, 3), padding=1)
    moved = replace(first, padding=second.padding), replace(second, padding=())
    x = randn(3, 2, 3, 6, 5)
    expected, got = run_chain((first, second), x), run(compose(*moved), x)
    inside = (..., slice(1, -1), slice(1, -1))
    assert_same(expected[inside], got[inside])
    assert (expected - got).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_pointwise_conv_with_a_bias_passes_padding_that_repeats_pixels(mode):
    first = identity(4, dtype=torch.float64) if mode == "circular" else conv2d(4, 4, bias=True)
    second = conv2d(4, 2, (3, 4), padding=2, padding_mode=mode, bias=True)
    x = randn(3, 2, 4, 6, 5)
    merged = compose(first, second)
    assert merged.padding_mode == mode
    assert_value_is(merged, x, run_chain((first, second), x))


def test_seed_branches_of_three_shapes_add_up_on_the_right_axes():
    square, tall, wide = (
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 1), padding=(1, 0)),
        nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
    )
    x = randn(3, 2, 4, 7, 5)
    branches = [module.double() for module in (square, tall, wide)]
    merged = add(*map(fold, branches))
    assert merged.kernel_size == (3, 3)
    assert_same(sum(module(x) for module in branches).detach(), merged(x).detach())


def test_even_kernels_align_by_their_taps_and_not_by_their_centres():
    left = AffineConv(weight=randn(1, 2, 2, 2), padding=((1, 0),))
    right = AffineConv(weight=randn(2, 2, 2, 2), padding=((0, 1),))
    merged = add(left, right)
    assert merged.kernel_size == (3,)
    assert merged.padding == ((1, 1),)
    x = randn(3, 2, 2, 5)
    assert_value_is(merged, x, run(left, x) + run(right, x))


def test_dilations_that_share_no_spacing_are_densified():
    two, three = (AffineConv(weight=randn(d, 2, 2, 3), dilation=(d,), padding=((d, d),)) for d in (2, 3))
    merged = add(two, three)
    assert (merged.kernel_size, merged.dilation) == ((7,), (1,))
    assert add(two, replace(two, dilation=(4,), padding=((4, 4),))).dilation == (2,)
    x = randn(3, 2, 2, 9)
    assert_value_is(merged, x, run(two, x) + run(three, x))


def test_the_dilation_of_a_kernel_of_one_tap_densifies_nothing():
    spread, point = conv2d(4, 4, (3, 3), padding=2, dilation=(2, 2)), conv2d(4, 4, dilation=(3, 3))
    x = randn(3, 2, 4, 7, 6)
    assert (add(spread, point).kernel_size, add(spread, point).dilation) == ((3, 3), (2, 2))
    assert_value_is(add(spread, point), x, run(spread, x) + run(point, x))
    assert compose(conv2d(4, 4, (3, 3), dilation=(4, 4)), conv2d(4, 4, dilation=(3, 3))).dilation == (4, 4)


def test_groups_of_branches_meet_in_their_greatest_common_divisor():
    assert add(conv2d(12, 12, groups=6), conv2d(12, 12, groups=4)).groups == 2
    assert add(dirac(4, (3, 3), 4), dirac(4, (1, 1), 4)).groups == 4


@pytest.mark.parametrize("join", [add, concat, interleave])
@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        (conv2d(4, 4), conv2d(3, 4), "in_channels"),
        (conv2d(4, 4), conv2d(4, 4, stride=(2, 1)), "stride"),
        (conv2d(4, 4, (3, 3), padding=1), conv2d(4, 4, (3, 3)), "output grids"),
        (
            conv2d(4, 4, (3, 3), padding=1, padding_mode="reflect"),
            conv2d(4, 4, (5, 5), padding=2, padding_mode="circular"),
            "padding_mode",
        ),
        (conv2d(4, 4, (3, 3), padding=1), conv2d(4, 4, (3, 3), padding=1, padding_mode="reflect"), "padding_mode"),
    ],
)
def test_branches_that_do_not_match_are_refused_by_what_differs(join, a, b, what):
    with pytest.raises(FoldError, match=rf"cannot {join.__name__} .*{what}.* differ; every branch needs the same"):
        join(a, b)


@pytest.mark.parametrize("join", [add, interleave])
def test_branches_that_are_added_or_interleaved_write_the_same_channels(join):
    with pytest.raises(FoldError, match="out_channels differ"):
        join(conv2d(4, 4), conv2d(4, 6))


def test_the_padding_mode_of_a_branch_that_does_not_pad_is_no_obstacle():
    padded = conv2d(4, 4, (3, 3), padding=1, padding_mode="reflect")
    pointwise = conv2d(4, 4, padding_mode="circular")
    x = randn(3, 2, 4, 5, 6)
    assert_value_is(add(padded, pointwise), x, run(padded, x) + run(pointwise, x))


@pytest.mark.parametrize("join", [add, concat, interleave, split_concat])
def test_no_branches_make_no_conv_and_one_branch_is_itself(join):
    with pytest.raises(FoldError, match="needs at least one"):
        join()
    conv, x = conv2d(4, 6, (3, 2), bias=True), randn(3, 2, 4, 5, 6)
    assert_value_is(join(conv), x, run(conv, x))


@pytest.mark.parametrize("join", [add, concat, interleave, split_concat, compose])
def test_different_numbers_of_spatial_dims_do_not_mix(join):
    with pytest.raises(FoldError, match="has 1 spatial dims; needed 2"):
        join(AffineConv(weight=randn(1, 4, 4, 3)), conv2d(4, 4))


def test_channels_that_do_not_meet_are_refused():
    with pytest.raises(FoldError, match=r"cannot compose .*3->4.* with .*5->4.*channels"):
        compose(conv2d(3, 4), conv2d(5, 4))


def test_interleaved_depthwise_convs_stay_grouped():
    depthwise = conv2d(6, 6, (3, 3), padding=1, groups=6)
    merged = interleave(depthwise, dirac(6, (1, 1), 6))
    assert (merged.groups, merged.weight.shape) == (6, (12, 1, 3, 3))
    x = randn(3, 2, 6, 5, 4)
    assert_same(run(depthwise, x), merged(x)[:, ::2])
    assert_same(x, merged(x)[:, 1::2])


@pytest.mark.parametrize(
    ("shapes", "groups"),
    [
        (((4, 4, 4), (4, 4, 4)), 8),
        (((4, 4, 1), (4, 4, 1)), 2),
        (((4, 4, 2), (4, 4, 4)), 4),
        (((2, 4, 1), (4, 8, 2)), 3),
        (((1, 1, 1), (2, 2, 1)), 1),
        (((3, 1, 1), (1, 3, 1)), 1),
    ],
)
def test_split_concat_finds_the_finest_groups_of_its_blocks(shapes, groups):
    convs = [conv2d(read, written, groups=own) for read, written, own in shapes]
    assert split_concat(*convs).groups == groups


def test_split_branches_differ_in_grid_only_by_refusal():
    with pytest.raises(FoldError, match=r"output grids .* differ"):
        split_concat(conv2d(2, 2, (3, 3)), conv2d(2, 2))


@pytest.mark.parametrize("kernel_size", [(2, 3), (3, 1), (3,), (3, 3, 3)])
def test_kernels_only_grow(kernel_size):
    with pytest.raises(FoldError, match="kernels only grow, per spatial dim"):
        pad_kernel(conv2d(4, 4, (3, 2)), kernel_size)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [(((0, 0), (0, 0)), ((1, 1), (1, 0))), (((0, 2), (1, 0)), ((2, 2), (1, 1))), (((5, 0), (0, 9)), ((5, 2), (1, 9)))],
)
def test_padding_grows_as_evenly_as_the_old_padding_allows(padding, expected):
    grown = pad_kernel(AffineConv(weight=randn(1, 2, 2, 1, 2), padding=padding), (3, 3))
    assert sorted(grown.padding[1]) == sorted(expected[1])
    assert grown.padding[0] == expected[0]


@pytest.mark.parametrize("groups", [0, -1, 3, 8])
def test_new_groups_divide_the_old(groups):
    with pytest.raises(FoldError, match=rf"to groups={groups}: the new groups must divide the old"):
        ungroup(conv2d(4, 4, groups=4), groups)


def test_ungrouping_puts_zeros_across_the_old_groups():
    grouped = conv2d(4, 6, (1, 1), groups=2)
    dense = ungroup(grouped, 1).weight[..., 0, 0]
    assert torch.equal(dense, torch.block_diag(*grouped.weight[..., 0, 0].chunk(2)))


def test_values_of_different_dtypes_meet_in_the_wider_one():
    narrow, wide = conv2d(4, 4, bias=True).to(dtype=torch.bfloat16), conv2d(4, 4)
    for merged in (add(narrow, wide), compose(narrow, wide), concat(wide, narrow), split_concat(narrow, wide)):
        assert merged.weight.dtype == merged.bias.dtype == torch.float64


def test_a_bias_is_summed_over_the_taps_of_the_next_kernel():
    first, second = conv2d(3, 4, (2, 1), bias=True), conv2d(4, 6, (3, 2), groups=2, bias=True)
    silent = replace(first, weight=torch.zeros_like(first.weight))
    x = randn(3, 1, 3, 6, 5)
    expected = F.conv2d(first.bias.reshape(1, 4, 1, 1).expand(1, 4, 5, 5), second.weight, second.bias, groups=2)
    assert_same(expected, compose(silent, second)(x))
