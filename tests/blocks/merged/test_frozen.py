"""Parts that do not learn: norms on their running statistics, parameters without gradients, inputs without."""

import pytest
import torch
from blocks.claims import BUILDERS
from blocks.merged.cases import (
    METHODS,
    assert_same_step,
    differences,
    image,
    made,
    method_of,
    over,
    scales,
    step,
    stepped,
)
from blocks.merged.mixtures import MIXTURES, make_mixture
from support import batch_norms
from torch import nn

import repblocks as rb

PLACES = {
    "dense": over(4, 4, 3, batch=2),
    "pointwise": over(6, 6, 1),
    "depthwise": over(4, 4, 3, groups=4, channels_last=True),
    "depthwise_stride_2": over(4, 4, 5, groups=4, stride=2),
}
over_places = pytest.mark.parametrize("place", PLACES)


def freeze_all_norms(block):
    for norm in batch_norms(block):
        norm.eval()


def freeze_one_norm(block):
    for norm in batch_norms(block)[:1]:
        norm.eval()


def freeze_all_norms_but_one(block):
    for norm in batch_norms(block)[1:]:
        norm.eval()


def freeze_norms_and_their_parameters(block):
    for norm in batch_norms(block):
        norm.eval().requires_grad_(requires_grad=False)


def freeze_affine_parameters(block):
    for norm in batch_norms(block):
        norm.requires_grad_(requires_grad=False)


def freeze_one_factor(block):
    for norm in batch_norms(block)[-1:]:
        norm.weight.requires_grad_(requires_grad=False)


def freeze_convolutions(block):
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(requires_grad=False)


def freeze_one_kernel(block):
    for kernel in [p for p in block.parameters() if p.ndim == 4][:1]:
        kernel.requires_grad_(requires_grad=False)


def freeze_all_parameters(block):
    block.requires_grad_(requires_grad=False)


def freeze_nothing(block):
    """For inputs that need no gradient."""


FREEZES = [
    freeze_all_norms,
    freeze_one_norm,
    freeze_all_norms_but_one,
    freeze_norms_and_their_parameters,
    freeze_affine_parameters,
    freeze_one_factor,
    freeze_convolutions,
    freeze_one_kernel,
    freeze_all_parameters,
    freeze_nothing,
]
over_freezes = pytest.mark.parametrize("freeze", FREEZES, ids=lambda freeze: freeze.__name__.removeprefix("freeze_"))
MAKERS = {**BUILDERS, **{name: make_mixture(name) for name in MIXTURES}}
FREEZABLE = sorted(
    {*BUILDERS, "norms_in_series", "norm_first", "frozen_beside_live", "norms_of_all_kinds", "nested_sums"}
)


def frozen(name, place, freeze):
    if name == "repmixer":  # which keeps the map
        place = {"depthwise_stride_2": "depthwise"}.get(place, place)
    if name == "edge":
        place = {"pointwise": "dense"}.get(place, place)
    block, geometry = made(MAKERS[name], PLACES[place]), PLACES[place]
    freeze(block)
    return block, geometry.image()


@over_freezes
@pytest.mark.parametrize("name", FREEZABLE)
def test_frozen_parts_leave_the_same(name, freeze):
    for place in ("dense", "pointwise", "depthwise"):
        block, x = frozen(name, place, freeze)
        assert_same_step(block, x)
        assert_same_step(block, x.detach())


@over_places
def test_a_frozen_norm_keeps_its_statistics(place):
    block, x = frozen("repvgg", place, freeze_all_norms_but_one)
    before = [norm.running_mean.clone() for norm in batch_norms(block)]
    for method in METHODS:
        twin = stepped(block, x, method)
        after = [value for name, value in twin.items() if name.endswith("running_mean")]
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, *[True] * (len(after) - 1)]


@over_places
@pytest.mark.parametrize("name", ["repvgg", "mobileone", "acb", "repvit", "qarepvgg"])
def test_a_block_of_frozen_norms_is_one_convolution(name, place):
    block, x = frozen(name, place, freeze_all_norms)
    assert method_of(block, x, "merged") == "folded"
    assert_same_step(block, x, "merged", "auto")


def test_parameters_and_inputs_without_gradients_give_an_output_without():
    block, x = frozen("mobileone", "pointwise", freeze_all_parameters)
    for method in ("separate", "merged", "auto", *METHODS):
        rb.set_execution(block, method)
        assert not block(x.detach()).requires_grad
        assert block(x).requires_grad


def test_freezing_between_two_steps_is_seen():
    """Modes and gradients are looked at in every pass, not once."""
    changes = [freeze_nothing, freeze_one_norm, freeze_all_norms, lambda block: block.train(), freeze_one_kernel]
    x = image(3, 4, 6, 7)
    blocks = {}
    for method in ("separate", *METHODS):
        blocks[method] = made(BUILDERS["repvgg"], PLACES["dense"])
        rb.set_execution(blocks[method], method)
    for change in changes:
        left = {}
        for method, block in blocks.items():
            change(block)
            block.zero_grad()
            left[method] = step(block, x)
        scale = scales(blocks["separate"], x, left["separate"])
        assert not differences(left["patches"], left["separate"], scale)
        assert not differences(left["outputs"], left["separate"], scale)
