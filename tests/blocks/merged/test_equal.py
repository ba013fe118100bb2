"""The merged executions leave what separate branches leave, over every block, mixture and geometry."""

from dataclasses import replace

import pytest
from blocks.claims import BUILDERS, refused
from blocks.merged.cases import GEOMETRIES, assert_same_step, image, made, over, training
from blocks.merged.mixtures import DEPTHWISE_ONLY, KEEP_THE_MAP, MIXTURES, make_mixture

import repblocks as rb
from repblocks.blocks.merged import depthwise, layout, outputs, patches
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


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("place", GEOMETRIES)
@pytest.mark.parametrize("name", ["mobileone", "repvit", "norms_of_all_kinds"])
def test_a_batch_that_is_run_in_parts_leaves_the_same(name, place, images, monkeypatch):
    """As a large one is; parts of one and two images, of which the last one may be smaller."""
    geometry = replace(GEOMETRIES[place], batch=3)
    monkeypatch.setattr(layout, "parts_of", lambda *maps: in_images(len(maps[0]), images))
    for module in (outputs, patches, depthwise):
        monkeypatch.setattr(module, "parts_of", layout.parts_of)
    make = BUILDERS.get(name) or make_mixture(name)
    assert_same_step(made(make, geometry), geometry.image())


def in_images(batch, images):
    return [slice(start, start + images) for start in range(0, batch, images)]


@pytest.mark.parametrize("place", ["pointwise_stride_2", "pointwise_with_identity", "stem"])
def test_symmetric_products_in_blocks_leave_the_same(place, monkeypatch):
    """As those of more than 64 channels are."""
    monkeypatch.setattr(layout, "_BLOCK", 4)
    assert_same_step(made(BUILDERS["mobileone"], GEOMETRIES[place]), GEOMETRIES[place].image())


def test_many_channels_leave_the_same():
    geometry = over(70, 66, 1, size=(9, 8), stride=2)
    assert_same_step(made(BUILDERS["mobileone"], geometry), geometry.image())


@pytest.mark.parametrize("shape", [(64, 64, 3, 64), (64, 64, 1, 1)])
def test_a_large_batch_leaves_the_same(shape):
    """Of several parts without any help."""
    *sizes, groups = shape
    block = training(rb.MobileOneConv(*sizes, groups=groups, num_conv_branches=1))
    assert_same_step(block, image(9, 64, 40, 41))
