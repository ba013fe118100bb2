"""The merged executions leave what separate branches leave, over every block, mixture and geometry."""

import pytest
from blocks.claims import BUILDERS, refused
from blocks.merged.cases import GEOMETRIES, assert_same_step, made
from blocks.merged.mixtures import DEPTHWISE_ONLY, KEEP_THE_MAP, MIXTURES, make_mixture

from repblocks.blocks.spec import ConvSpec

# Every kind of geometry once; the zoo's blocks are tested over all of them.
SOME = [
    "dense",
    "dense_with_identity",
    "stem",
    "dense_kernel_4_stride_2",
    "dense_padded_per_side",
    "dense_reflect",
    "grouped",
    "pointwise_with_identity",
    "pointwise_stride_2",
    "pointwise_padded",
    "depthwise",
    "depthwise_stride_2_channels_last",
    "depthwise_multiplied",
    "depthwise_kernel_4",
    "depthwise_dilated",
    "depthwise_map_below_the_kernel",
    "depthwise_two_values",
]


def fits(name, geometry):
    spec = ConvSpec.of(*geometry.shape, **geometry.arguments())
    if name in DEPTHWISE_ONLY:
        even = all(p[0] == p[1] <= k // 2 for p, k in zip(spec.padding, spec.kernel_size, strict=True))
        return spec.is_depthwise and spec.dilation == (1, 1) and even and spec.padding_mode == "zeros"
    return name not in KEEP_THE_MAP or spec.keeps_the_map


BLOCK_CASES = [
    (name, place)
    for name in sorted(BUILDERS)
    for place, geometry in GEOMETRIES.items()
    if not refused(name, geometry.shape, geometry.arguments())
]
MIXTURE_CASES = [(name, place) for name in sorted(MIXTURES) for place in SOME if fits(name, GEOMETRIES[place])]


@pytest.mark.parametrize(("name", "place"), BLOCK_CASES)
def test_a_block_of_the_zoo_leaves_the_same(name, place):
    geometry = GEOMETRIES[place]
    assert_same_step(made(BUILDERS[name], geometry), geometry.image())


@pytest.mark.parametrize(("name", "place"), MIXTURE_CASES)
def test_a_mixture_leaves_the_same(name, place):
    geometry = GEOMETRIES[place]
    assert_same_step(made(make_mixture(name), geometry), geometry.image())
