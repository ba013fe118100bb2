import itertools

import pytest
import torch
from support import randomise_batch_norms
from torch import nn

import repblocks as rb
from repblocks.blocks import RepNeXtMConv, RepNeXtMSmallConv
from repblocks.blocks.branches import conv, serial
from repblocks.blocks.spec import ConvSpec

PADDINGS = [{}, {"padding": 0}, {"padding": ((1, 0), (0, 4))}, {"padding": 2, "padding_mode": "reflect"}]
GEOMETRIES = [
    {"stride": stride, "dilation": dilation, **padding}
    for stride, dilation, padding in itertools.product((1, 2, (2, 1)), (1, 2), PADDINGS)
]


def random(block):
    return randomise_batch_norms(block.double(), torch.Generator().manual_seed(0)).eval()


def image(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def shapes(module):
    return {key: tuple(p.shape[2:]) for key, p in module.named_parameters() if p.ndim == 4}


def biased(module):
    return {key.removesuffix(".bias") for key, p in module.named_parameters() if p.ndim == 1}


def test_the_medium_unit_has_the_published_kernels_and_biases():
    unit = RepNeXtMConv(6, norm_layer=None)
    assert shapes(unit) == {
        "branches.square.weight": (7, 7),
        "branches.tall.weight": (5, 3),
        "branches.wide.weight": (3, 5),
        "branches.serial.0.weight": (1, 7),
        "branches.serial.1.weight": (7, 1),
        "branches.small_serial.0.weight": (1, 5),
        "branches.small_serial.1.weight": (5, 1),
    }
    assert biased(unit) == {"branches.square", "branches.tall", "branches.wide"}
    assert {p.shape[1] for p in unit.parameters() if p.ndim == 4} == {1}
    assert shapes(rb.deployed(unit)) == {"conv.weight": (7, 7)}


def test_the_small_unit_has_parallel_lines_with_bias_or_serial_ones_without():
    kernels = {"branches.square.weight": (3, 3), "branches.corners.weight": (2, 2)}
    parallel, in_series = RepNeXtMSmallConv(4), RepNeXtMSmallConv(4, lines="serial", stride=2)
    assert shapes(parallel) == {**kernels, "branches.row.weight": (1, 3), "branches.column.weight": (3, 1)}
    assert biased(parallel) == {"branches.square", "branches.row", "branches.column", "branches.corners"}
    assert shapes(in_series) == {**kernels, "branches.serial.0.weight": (1, 3), "branches.serial.1.weight": (3, 1)}
    assert biased(in_series) == {"branches.square", "branches.corners"}


def test_the_norm_of_the_sum_may_be_another_or_none():
    x = image(2, 4, 9, 10)
    for norm_layer in (nn.BatchNorm2d, lambda channels: nn.BatchNorm2d(channels, eps=1e-3), None):
        unit = random(RepNeXtMConv(4, norm_layer=norm_layer))
        torch.testing.assert_close(rb.deployed(unit)(x), unit(x), rtol=1e-12, atol=1e-12)
    assert not [module for module in RepNeXtMConv(4, norm_layer=None).modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("lines", ["parallel", "serial"])
@pytest.mark.parametrize("groups", [1, 6])
def test_the_small_unit_collapses_exactly_in_every_geometry(lines, groups, geometry):
    unit = random(RepNeXtMSmallConv(6, 12, lines=lines, groups=groups, **geometry))
    x = image(2, 6, 11, 14)
    torch.testing.assert_close(rb.deployed(unit)(x), unit(x), rtol=1e-12, atol=1e-12)


def test_unknown_lines_are_refused():
    with pytest.raises(rb.ConfigurationError, match="parallel"):
        RepNeXtMSmallConv(4, lines="crossed")


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("size", [(5, 5), (1, 2)], ids=str)
def test_a_serial_pair_is_one_kernel_of_rank_one(size, geometry):
    spec = ConvSpec.of(6, 6, (5, 7), groups=6, **geometry)
    pair, whole = serial(spec, size).double(), conv(spec, size).double()
    with torch.no_grad():
        whole.weight.copy_(pair[1].weight * pair[0].weight)
    x = image(2, 6, 17, 18)
    torch.testing.assert_close(pair(x), whole(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rb.fold(pair)(x), whole(x), rtol=1e-12, atol=1e-12)
