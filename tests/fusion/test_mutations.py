"""The laws notice wrong arithmetic: each mutant is a mistake that some published code makes, and breaks its law."""

from dataclasses import replace

import pytest
import torch
from fusion import laws
from hypothesis import Phase, given, settings
from strategies import (
    any_pairs,
    chains,
    convs_with_input,
    diracs,
    grown_kernels,
    parallel,
    pointwise_chains,
    shortcut_chains,
    ungroupings,
)

from repblocks import fusion
from repblocks.fusion import AffineConv, affine_conv, alignment, kernels, shortcut

correlated, covers, place = kernels._correlated_kernels, kernels._covers_border, kernels._place_blocks
taps_of, kernel, on_window = alignment.Window._taps_of, alignment.Window.kernel, alignment.Window.conv
biases = kernels._biases
grow, ungroup = kernels.grow, kernels.ungroup


def transposed(weight):
    square = weight.ndim > 3 and weight.shape[-1] == weight.shape[-2]
    return weight.transpose(-1, -2) if square else weight


def at_the_first_tap(window, conv, dim):
    taps = taps_of(window, conv, dim)
    return slice(0, taps.stop - taps.start, taps.step)


def unflipped(first, second):
    spatial = tuple(range(2, second.weight.ndim))
    return correlated(first, replace(second, weight=second.weight.flip(spatial)))


def padded_once_more(conv):
    return replace(conv, padding=tuple((before + 1, after + 1) for before, after in conv.padding))


def ones(channels, **_):
    return AffineConv(weight=torch.ones(channels, channels))


def dense_dirac(channels, kernel_size, groups, dtype):
    conv = fusion.constructors.dirac(channels, kernel_size, groups, dtype=dtype)
    weight = torch.zeros_like(conv.weight)
    rows = torch.arange(min(weight.shape[:2]))
    weight[(rows, rows, *(k // 2 for k in kernel_size))] = 1
    return replace(conv, weight=weight)


def rolled(conv, groups):
    dense = ungroup(conv, groups)
    return dense if groups == conv.groups else replace(dense, weight=dense.weight.roll(1, dims=1))


MUTANTS = {
    "the bias of the first conv is dropped": (
        (kernels, "_composed_bias", lambda first, second: second.bias),
        (laws.compose_is_the_chain, chains()),
    ),
    "the second kernel is not flipped": (
        (kernels, "_correlated_kernels", unflipped),
        (laws.compose_is_the_chain, chains()),
    ),
    "the axes of the merged kernel are swapped": (
        (kernels, "_correlated_kernels", lambda a, b: (transposed(correlated(a, b)[0]), correlated(a, b)[1])),
        (laws.compose_is_the_chain, chains()),
    ),
    "the dilation of the merged kernel is dropped": (
        (kernels, "_correlated_kernels", lambda a, b: (correlated(a, b)[0], (1,) * a.rank)),
        (laws.compose_is_the_chain, chains()),
    ),
    "the padding mode of the chain is dropped": (
        (kernels, "_composed_padding_mode", lambda first, second: "zeros"),
        (laws.compose_is_the_chain, pointwise_chains()),
    ),
    "the border is not looked at": (
        (kernels, "_covers_border", lambda *_: True),
        (laws.compose_is_exact_or_refuses, any_pairs()),
    ),
    "the border is missed by one pixel": (
        (kernels, "_covers_border", lambda first, *side: covers(padded_once_more(first), *side)),
        (laws.compose_is_exact_or_refuses, any_pairs()),
    ),
    "the scale before a grouped conv ignores its groups": (
        (
            kernels,
            "_per_input_channel",
            lambda values, conv: values[: conv.weight.shape[1]][None, :].reshape(1, -1, *(1,) * conv.rank),
        ),
        (laws.compose_is_the_chain, chains()),
    ),
    "small kernels are aligned at their first tap": (
        (alignment.Window, "_taps_of", at_the_first_tap),
        (laws.add_is_the_sum, parallel()),
    ),
    "small kernels are placed along the wrong axis": (
        (alignment.Window, "kernel", lambda *given: transposed(kernel(*given))),
        (laws.add_is_the_sum, parallel()),
    ),
    "the dilation of the branches is dropped": (
        (alignment.Window, "conv", lambda window, *given: replace(on_window(window, *given), dilation=())),
        (laws.add_is_the_sum, parallel()),
    ),
    "the padding mode of the branches is dropped": (
        (alignment.Window, "conv", lambda window, *given: replace(on_window(window, *given), padding_mode="zeros")),
        (laws.concat_is_the_concatenation, parallel(same_out=False)),
    ),
    "missing biases are skipped": (
        (kernels, "_biases", lambda convs: [conv.bias for conv in convs if conv.bias is not None] * len(convs)),
        (laws.concat_is_the_concatenation, parallel(same_out=False)),
    ),
    "biases are joined in the wrong order": (
        (kernels, "_biases", lambda convs: biases(convs[::-1])),
        (laws.interleave_alternates_the_channels, parallel()),
    ),
    "every slice starts at the first channel": (
        (kernels, "_place_blocks", lambda conv, start, reads: place(conv, 0, reads)),
        (laws.split_concat_reads_slices, parallel(same_in=False, same_out=False)),
    ),
    "a grouped kernel is spread to the wrong channels": (
        (fusion, "ungroup", rolled),
        (laws.ungroup_changes_nothing, ungroupings()),
    ),
    "padding does not grow with the kernel": (
        (kernels, "grow", lambda conv, margin: replace(grow(conv, margin), padding=conv.padding)),
        (laws.pad_kernel_changes_nothing, grown_kernels()),
    ),
    "asymmetric padding is cut": (
        (affine_conv, "with_symmetric_padding", lambda conv: conv),
        (laws.pad_kernel_changes_nothing, grown_kernels()),
    ),
    "the identity is all ones": (
        (fusion, "identity", ones),
        (laws.identity_is_the_unit, convs_with_input()),
    ),
    "the dirac kernel fills one diagonal of all groups": (
        (fusion, "dirac", dense_dirac),
        (laws.dirac_changes_nothing, diracs()),
    ),
    "the carried channels take a tap beside the output pixel": (
        (shortcut, "_centred", lambda conv: conv),
        (laws.the_shortcut_is_absorbed, shortcut_chains()),
    ),
    "biases go to the carried channels": (
        (
            shortcut,
            "_expanded_bias",
            lambda conv, own_out, writes: None if conv.bias is None else conv.bias.repeat(writes)[:writes],
        ),
        (laws.the_shortcut_is_absorbed, shortcut_chains()),
    ),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_law_notices_that(mistake, monkeypatch):
    patch, (law, cases) = MUTANTS[mistake]
    monkeypatch.setattr(*patch)
    only_search = settings(max_examples=300, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        only_search(given(cases)(law))()
