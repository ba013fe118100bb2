"""One test per paradigm of seed 001, under its section's title, and those of seeds 000 and 002."""

import pytest
import torch
import torch.nn.functional as F
from fusion.laws import assert_same, assert_value_is
from fusion.modules import conv_norm, prepared
from strategies import randn
from torch import Tensor, nn

import repblocks as rb
from repblocks.errors import FoldError
from repblocks.fusion import (
    AffineConv,
    Concat,
    Sum,
    absorb_shortcut,
    add,
    compose,
    fold,
    from_adaptive_pool,
    from_batch_norm,
    from_flattened_linear,
    from_linear,
    from_pool,
    identity,
    interleave,
    pad_kernel,
    pad_with_bias,
    scale,
    to_linear,
)
from repblocks.fusion.geometry import flat_padding

X = randn(0, 3, 8, 9, 7)


def conv(written: int, read: int, *kernel_size: int, seed: int = 1, bias: bool = True, **geometry) -> AffineConv:
    weight = randn(seed, written, read // geometry.get("groups", 1), *kernel_size)
    return AffineConv(weight=weight, bias=randn(seed + 1, written) if bias else None, **geometry)


def same(*kernel_size: int) -> tuple[tuple[int, int], ...]:
    return tuple((k // 2, k - 1 - k // 2) for k in kernel_size)


def assert_folds(module: nn.Module, x: Tensor = X) -> AffineConv:
    with torch.no_grad():
        value = fold(module, x.shape[1])
        assert_value_is(value, x, module(x))
    return value


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_1_a_conv_layer_and_its_subsequent_bn_layer(groups):
    assert_folds(prepared(conv_norm(8, 16, 3, padding=1, groups=groups)))


def test_2_parallel_conv_layers_for_branch_addition():
    assert_folds(prepared(Sum([nn.Conv2d(8, 4, 3, padding=1) for _ in range(3)])))


def test_3_parallel_conv_layers_for_depth_concatenation():
    value = assert_folds(prepared(Concat([nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1, bias=False)])))
    assert value.out_channels == 6


@pytest.mark.parametrize("container", [Sum, Concat])
def test_4_parallel_conv_layers_of_different_sizes(container):
    sizes = [(3, 3), (3, 1), (1, 3), (1, 1), (5, 2)]
    branches = [conv(4, 8, *size, seed=seed, padding=same(*size)) for seed, size in enumerate(sizes)]
    merged = (add if container is Sum else rb.concat)(*branches)
    assert merged.kernel_size == (5, 3)
    outputs = [branch(X) for branch in branches]
    assert_value_is(merged, X, sum(outputs) if container is Sum else torch.cat(outputs, dim=1))
    assert_value_is(pad_kernel(branches[1], (5, 4)), X, outputs[1])


GROUPS = [(1, 1), (1, 4), (4, 1), (4, 4), (2, 4), (8, 2), (8, 8)]


@pytest.mark.parametrize(("g1", "g2"), GROUPS)
def test_5a_the_pointwise_conv_layer_is_in_front_of_the_standard_conv_layer(g1, g2):
    first, second = conv(16, 8, 1, 1, groups=g1), conv(24, 16, 3, 2, seed=3, groups=g2)
    merged = compose(first, second)
    assert (merged.kernel_size, merged.groups) == ((3, 2), min(g1, g2))
    assert_value_is(merged, X, second(first(X)))


@pytest.mark.parametrize(("g1", "g2"), GROUPS)
def test_5b_the_standard_conv_layer_is_in_front_of_the_pointwise_conv_layer(g1, g2):
    first, second = conv(16, 8, 3, 2, groups=g1, padding=same(3, 2)), conv(24, 16, 1, 1, seed=3, groups=g2)
    merged = compose(first, second)
    assert (merged.kernel_size, merged.groups) == ((3, 2), min(g1, g2))
    assert_value_is(merged, X, second(first(X)))


def test_5_zero_padding_between_a_bias_and_a_kernel_is_refused():
    with pytest.raises(FoldError, match="zero padding after a bias is not a convolution at the border"):
        compose(conv(16, 8, 1, 1), conv(8, 16, 3, 3, padding=same(3, 3)))


@pytest.mark.parametrize("first", [conv(6, 8, 1, 1), conv(6, 8), conv(6, 8, 1, 1, bias=False)], ids=repr)
def test_5_padding_by_the_bias_folds(first):
    padding, second = ((1, 2), (0, 3)), conv(4, 6, 3, 3, seed=3)
    border = torch.zeros(6, 1, 1).double() if first.bias is None else first.bias[:, None, None]
    padded = F.pad(first(X) - border, flat_padding(padding)) + border
    assert_value_is(pad_with_bias(first, padding), X, padded)
    assert_value_is(pad_with_bias(first, padding), X, first(F.pad(X, flat_padding(padding))))
    assert_value_is(compose(pad_with_bias(first, padding), second), X, second(padded))


def test_5_padding_by_the_bias_keeps_the_dtype():
    padded = pad_with_bias(conv(6, 8, 1, 1).to(dtype=torch.float16), ((1, 2), (0, 3)))
    assert padded.weight.dtype == padded.bias.dtype == torch.float16


def test_5_padding_by_the_bias_of_a_kernel_folds_only_if_it_covers_its_border():
    full = conv(6, 8, 3, 1, stride=(2, 1), padding=((2, 2), (0, 0)))
    padded = F.pad(full(X) - full.bias[:, None, None], (1, 1, 2, 0)) + full.bias[:, None, None]
    assert_value_is(pad_with_bias(full, ((2, 0), (1, 1))), X, padded)
    with pytest.raises(FoldError, match="the zeros stand where the first kernel would still see the input"):
        pad_with_bias(conv(6, 8, 3, 1), ((1, 0), (0, 0)))


def test_seed_000_merging_two_kernels_of_900_and_5000_parameters():
    first = conv(100, 1, 3, 3, bias=False, padding=((2, 2), (2, 2)))
    second = conv(2, 100, 5, 5, seed=3, bias=False, padding=((4, 4), (4, 4)))
    merged, x = compose(first, second), randn(5, 1, 1, 6, 6)
    assert (first.weight.numel(), second.weight.numel(), merged.weight.numel()) == (900, 5000, 98)
    assert merged.weight.shape == (2, 1, 7, 7)
    assert_value_is(merged, x, second(first(x)))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_6a_one_conv_layer_in_the_main_branch(groups):
    main = conv(8, 8, 3, 5, padding=same(3, 5), groups=groups)
    merged = add(main, identity(8, dtype=X.dtype))
    assert merged.groups == groups
    assert_value_is(merged, X, main(X) + X)
    assert_value_is(absorb_shortcut([main], [])[0], X, main(X) + X)


def test_6b_multiple_conv_layers_in_the_main_branch():
    dw, pw1, pw2 = conv(8, 8, 7, 7, padding=same(7, 7), groups=8), conv(32, 8, 1, 1, seed=3), conv(8, 32, 1, 1, seed=5)
    wide, expand, shrink = absorb_shortcut([dw, pw1, pw2], [nn.Identity(), nn.GELU()])
    assert (wide.groups, wide.out_channels, expand.out_channels) == (8, 16, 40)
    assert_same(pw2(F.gelu(pw1(dw(X)))) + F.gelu(X), shrink(F.gelu(expand(wide(X)))))
    inserted = interleave(dw, identity(8, dtype=X.dtype))
    assert inserted.groups == 8
    assert_value_is(inserted, X, torch.stack([dw(X), X], dim=2).flatten(1, 2))


@pytest.mark.parametrize("groups", [None, 1, 2, 8])
@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d((2, 3), stride=1),
        nn.AvgPool2d((4, 1), (3, 2), (2, 0), divisor_override=5),
    ],
    ids=repr,
)
def test_7_switch_a_pooling_layer_into_a_conv_layer(pool, groups):
    value = from_pool(pool, 8, groups=groups, dtype=X.dtype)
    assert value.weight.shape[1] == 8 // (groups or 8)
    assert_value_is(value, X, pool(X))


@pytest.mark.parametrize("output_size", [1, (3, 7), (None, 1), (2, 2), (9, 1)])
def test_7_adaptive_pooling_of_a_known_size(output_size):
    pool = nn.AdaptiveAvgPool2d(output_size)
    x = randn(1, 2, 3, 9, 7)
    assert_value_is(from_adaptive_pool(pool, 3, (9, 7), dtype=x.dtype), x, pool(x))
    x = randn(1, 2, 3, 6, 5, 4)
    assert_value_is(
        from_adaptive_pool(nn.AdaptiveAvgPool3d((3, 4, 2)), 3, (6, 5, 4), dtype=x.dtype),
        x,
        F.adaptive_avg_pool3d(x, (3, 4, 2)),
    )


def test_7_adaptive_pooling_whose_windows_differ_is_refused():
    for output_size in (4, (9, 8), (5, 7)):
        with pytest.raises(FoldError, match=r"averages windows that differ over an input of \(9, 7\)"):
            from_adaptive_pool(nn.AdaptiveAvgPool2d(output_size), 8, (9, 7))
    with pytest.raises(FoldError, match="needed 2 spatial dims"):
        from_adaptive_pool(nn.AdaptiveAvgPool2d((1, 1)), 8, (9,))


@pytest.mark.parametrize("groups", [None, 1, 2, 8])
@pytest.mark.parametrize("kernel_size", [(), (1, 1), (3, 3), (5, 2)])
def test_8_switch_a_bn_layer_into_a_conv_layer(kernel_size, groups):
    norm = prepared(nn.BatchNorm2d(8))
    with torch.no_grad():
        value = from_batch_norm(norm, kernel_size, groups=groups)
        assert (value.kernel_size, value.groups) == (kernel_size, groups or 8)
        assert_value_is(value, X, norm(X))


def test_8_groups_of_a_bn_conv_divide_its_channels():
    with pytest.raises(FoldError, match="groups=3 must be positive and divide the 8 channels"):
        from_batch_norm(nn.BatchNorm2d(8), (3, 3), groups=3)


def test_9_interconversion_of_a_pointwise_conv_and_a_fully_connected_layer():
    fc = nn.Linear(8, 5).double()
    with torch.no_grad():
        value = from_linear(fc).promote(2)
        assert_value_is(value, X, fc(X.movedim(1, -1)).movedim(-1, 1))
    assert torch.equal(to_linear(value).weight, fc.weight)
    assert torch.equal(to_linear(value).bias, fc.bias)


@pytest.mark.parametrize("size", [(), (4,), (3, 4), (2, 3, 2)])
def test_9_a_linear_layer_after_flatten_is_a_conv_that_covers_its_input(size):
    x = randn(1, 3, 2, *size)
    fc = nn.Linear(x[0].numel(), 5).double()
    with torch.no_grad():
        value = from_flattened_linear(fc, size)
        assert value.kernel_size == size
        assert_same(fc(x.flatten(1)), value(x).flatten(1))


def test_9_a_linear_layer_after_a_conv_layer_and_flatten_folds_with_it():
    first, fc = conv(4, 8, 3, 3, stride=(2, 2), padding=same(3, 3)), nn.Linear(4 * 5 * 4, 6).double()
    with torch.no_grad():
        merged = compose(first, from_flattened_linear(fc, (5, 4)))
        assert_same(fc(first(X).flatten(1)), merged(X).flatten(1))


def test_9_a_linear_layer_after_global_average_pooling_folds_with_it():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double()
    with torch.no_grad():
        pool = from_adaptive_pool(head[0], 8, X.shape[2:], dtype=X.dtype)
        merged = compose(pool, from_linear(head[2]))
        assert merged.weight.shape == (5, 8, 9, 7)
        assert_same(head(X), merged(X).flatten(1))


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), r"from_flattened_linear\(fc, input_size\)"),
        (nn.AdaptiveAvgPool2d(1), r"from_adaptive_pool\(pool, channels, input_size\)"),
        (nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2)), "from_adaptive_pool"),
    ],
)
def test_9_what_depends_on_the_input_size_is_refused_and_told_its_constructor(module, remedy):
    with pytest.raises(FoldError, match=remedy):
        fold(module, 8)


def test_9_a_linear_layer_that_does_not_fit_the_input_size_is_refused():
    for size in ((3, 3), (0, 2), (-8, 1)):
        with pytest.raises(FoldError, match="needed the positive spatial dims before"):
            from_flattened_linear(nn.Linear(8, 5), size)


@pytest.mark.parametrize("layer", [conv(6, 8, 3, 3, padding=same(3, 3)), conv(6, 8, 3, 3, bias=False)], ids=repr)
def test_seed_002_a_channel_scale_or_layer_scale_folds_on_either_side(layer):
    gamma, before = randn(7, 6), randn(8, 8)
    assert_value_is(compose(layer, scale(gamma)), X, layer(X) * gamma[:, None, None])
    assert_value_is(compose(scale(before), layer), X, layer(X * before[:, None, None]))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), conv_norm(4, 4, 3)], ids=str)
def test_weights_that_are_not_finite_pass_through_a_fold_and_stop_a_deployment(layer, number):
    block = rb.BranchConv([prepared(layer)]).double().eval()
    next(block.parameters()).data[0] = number
    assert not fold(block.branches).weight.isfinite().all()
    with pytest.raises(FoldError, match="not finite"):
        rb.deployed(block)
