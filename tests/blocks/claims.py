"""The blocks under test, and which geometries each of them claims."""

import itertools

import pytest
from torch import nn

import repblocks as rb
from repblocks.blocks.branches import after_norm, conv, conv_bn, pointwise
from repblocks.blocks.spec import ConvSpec


def mixture(in_channels, out_channels, kernel_size=3, **geometry):
    """A block that a user might compose: padded behind a norm, a strip with a bias, a pointwise one after it all."""
    spec = ConvSpec.of(in_channels, out_channels, kernel_size, **geometry)
    strip = (1, spec.kernel_size[1])
    inner = ConvSpec.of(out_channels, out_channels, kernel_size, **geometry)
    branches = {
        "main": conv_bn(spec),
        "strip": nn.Sequential(
            conv(spec, strip, bias=True), nn.Conv2d(out_channels, out_channels, 1, groups=spec.groups)
        ),
        "deep": nn.Sequential(pointwise(spec, out_channels), *after_norm(inner, conv), nn.BatchNorm2d(out_channels)),
    }
    return rb.BranchConv(branches)


BUILDERS = {**rb.BLOCKS, "branchconv": mixture}

# What a block does not take; every other geometry is claimed, and tested.
REFUSES = {
    "repmixer": lambda spec: not spec.keeps_the_map,
    "edge": lambda spec: min(spec.kernel_size) < 3,
}


def refused(name, shape, geometry):
    return name in REFUSES and REFUSES[name](ConvSpec.of(*shape, **{"groups": 1, **geometry}))


def identify(case):
    return str(case).replace(" ", "").replace("'", "")


def over(shapes, geometries=({},)):
    """Parametrize over every block and every geometry that it claims: ``name, shape, geometry``."""
    cases = itertools.product(sorted(BUILDERS), shapes, geometries)
    claimed = [case for case in cases if not refused(*case)]
    return pytest.mark.parametrize(("name", "shape", "geometry"), claimed, ids=identify)
