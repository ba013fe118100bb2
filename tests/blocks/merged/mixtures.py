"""Blocks that no paper has, each with something that is easily executed wrongly: ``MIXTURES[name](spec)``."""

from collections.abc import Callable
from dataclasses import replace

import torch
from timm.layers import LayerScale2d
from torch import nn

import repblocks as rb
from repblocks.blocks.branches import after_norm, conv, conv_bn, pointwise, scaled, serial
from repblocks.blocks.layers import AlignedAvgPool2d, Constant, FixedConv2d, Shift, Squeezed
from repblocks.blocks.spec import ConvSpec
from repblocks.fusion import Concat, SplitConcat, Sum

MIXTURES: dict[str, Callable[[ConvSpec], nn.Module]] = {}


def mixture(build):
    MIXTURES[build.__name__] = build
    return build


def make_mixture(name: str):
    """As a class of the zoo: called with `nn.Conv2d`'s arguments."""
    return lambda *shape, **options: MIXTURES[name](ConvSpec.of(*shape, **options))


def mixing(spec: ConvSpec, *, bias: bool = False) -> nn.Conv2d:
    """1x1 over the output, in the block's groups."""
    return nn.Conv2d(spec.out_channels, spec.out_channels, 1, groups=spec.groups, bias=bias)


def normed(spec: ConvSpec, kernel_size=None, *, bias: bool = False, **norm) -> nn.Sequential:
    return nn.Sequential(conv(spec, kernel_size, bias=bias), nn.BatchNorm2d(spec.out_channels, **norm))


@mixture
def biased(spec):
    return rb.BranchConv([normed(spec, bias=True), normed(spec, (1, 1), bias=True)])


@mixture
def bare(spec):
    return rb.BranchConv([conv(spec, bias=True), conv(spec, (1, 1))])


@mixture
def layer_scales(spec):
    before = nn.Sequential(LayerScale2d(spec.in_channels, 0.5), conv(spec), nn.BatchNorm2d(spec.out_channels))
    return rb.BranchConv([before, scaled(conv_bn(spec, (1, 1)), spec.out_channels, 0.5)])


@mixture
def mean_of_three(spec):
    branches = [conv_bn(spec), conv_bn(spec, (1, 1)), nn.Sequential(conv_bn(spec), Constant(-1.0))]
    return rb.BranchConv([nn.Sequential(Sum(branches), Constant(1 / 3))])


@mixture
def average(spec):
    pool = nn.Sequential(AlignedAvgPool2d(spec), pointwise(spec, spec.out_channels), nn.BatchNorm2d(spec.out_channels))
    return rb.BranchConv([pool, conv_bn(spec)])


@mixture
def nested_sums(spec):
    inner = nn.Sequential(Sum([conv_bn(spec), conv(spec, (1, 1), bias=True)]), nn.BatchNorm2d(spec.out_channels))
    return rb.BranchConv([nn.Sequential(Sum([inner, conv_bn(spec, (1, 1))]), LayerScale2d(spec.out_channels, 0.5))])


@mixture
def two_in_series(spec):
    chain = nn.Sequential(conv(spec), mixing(spec, bias=True), nn.BatchNorm2d(spec.out_channels))
    return rb.BranchConv([chain, conv_bn(spec, (1, 1))])


@mixture
def strips_in_series(spec):
    chain = nn.Sequential(*serial(spec, spec.kernel_size), nn.BatchNorm2d(spec.out_channels))
    return rb.BranchConv([chain, conv_bn(spec)])


@mixture
def norms_in_series(spec):
    chain = nn.Sequential(
        *conv_bn(spec), mixing(spec), *(nn.BatchNorm2d(spec.out_channels, eps) for eps in (0.1, 1e-3))
    )
    return rb.BranchConv([chain, conv_bn(spec, (1, 1))])


@mixture
def norm_first(spec):
    return rb.BranchConv([after_norm(spec, conv), conv_bn(spec, (1, 1))])


@mixture
def padded_behind_a_norm(spec):
    inner = replace(spec, in_channels=spec.out_channels)
    deep = [pointwise(spec, spec.out_channels), *after_norm(inner, conv), nn.BatchNorm2d(spec.out_channels)]
    return rb.BranchConv({"deep": nn.Sequential(*deep), "flat": conv_bn(spec)})


@mixture
def norms_of_all_kinds(spec):
    kinds = [{"affine": False}, {"momentum": None}, {"eps": 0.3, "momentum": 0.9}, {"momentum": 0.0}, {"momentum": 1.0}]
    sizes = [None, (1, 1), None, (1, 1), (1, 1)]
    return rb.BranchConv([normed(spec, size, **kind) for size, kind in zip(sizes, kinds, strict=True)])


@mixture
def statistics_not_tracked(spec):
    """As torch lets one ask for after construction: buffers that stay as they are, and no buffers."""
    block = rb.BranchConv([conv_bn(spec), conv_bn(spec, (1, 1)), conv_bn(spec)])
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].track_running_stats = norms[1].track_running_stats = False
    norms[1].running_mean = norms[1].running_var = norms[1].num_batches_tracked = None
    return block


@mixture
def norm_shared_by_branches(spec):
    norm = nn.BatchNorm2d(spec.out_channels)
    return rb.BranchConv([nn.Sequential(conv(spec), norm), nn.Sequential(conv(spec, (1, 1)), norm)])


@mixture
def norm_shared_by_branches_averaging_its_batches(spec):
    norm = nn.BatchNorm2d(spec.out_channels, momentum=None)
    return rb.BranchConv([nn.Sequential(conv(spec), norm), nn.Sequential(conv(spec, (1, 1)), norm)])


@mixture
def conv_shared_by_branches(spec):
    shared = conv(spec)
    norms = [nn.BatchNorm2d(spec.out_channels, eps) for eps in (1e-5, 1e-1)]
    return rb.BranchConv([*(nn.Sequential(shared, norm) for norm in norms), shared])


@mixture
def concatenated(spec):
    mixer = nn.Conv2d(2 * spec.out_channels, spec.out_channels, 1)
    return rb.BranchConv([nn.Sequential(Concat([conv_bn(spec), conv(spec, (1, 1))]), mixer), conv_bn(spec)])


@mixture
def fixed_filter(spec):
    sobel = torch.arange(float(spec.kernel_size[0] * spec.kernel_size[1])).view(spec.kernel_size)
    width = spec.in_channels
    chain = [FixedConv2d(spec.depthwise(width), sobel), pointwise(spec, spec.out_channels)]
    return rb.BranchConv([nn.Sequential(*chain, nn.BatchNorm2d(spec.out_channels)), conv_bn(spec, (1, 1))])


@mixture
def squeezed(spec):
    chain = [
        Squeezed(Sum([conv(spec), conv(spec, (1, 1))])),
        nn.BatchNorm2d(spec.out_channels),
        Shift(spec.out_channels),
    ]
    return rb.BranchConv([nn.Sequential(*chain), conv_bn(spec)])


@mixture
def block_in_a_block(spec):
    return rb.BranchConv([rb.BranchConv([conv_bn(spec), conv_bn(spec, (1, 1))]), conv_bn(spec)])


@mixture
def dropout_that_drops_nothing(spec):
    return rb.BranchConv([nn.Sequential(*conv_bn(spec), nn.Dropout2d(0.0)), conv_bn(spec, (1, 1))])


@mixture
def dropout(spec):
    return rb.BranchConv([nn.Sequential(*conv_bn(spec), nn.Dropout2d(0.5)), conv_bn(spec, (1, 1))])


@mixture
def frozen_beside_live(spec):
    """A chain whose first norm does not follow the batch, while the one behind it does."""
    return rb.BranchConv([nn.Sequential(*conv_bn(spec), mixing(spec), nn.BatchNorm2d(spec.out_channels))])


def identity_only(spec):
    return rb.BranchConv([nn.Identity()], in_channels=spec.in_channels)


def norm_only(spec):
    return rb.BranchConv([nn.BatchNorm2d(spec.in_channels)])


def norms_and_identity(spec):
    """No convolution anywhere."""
    norms = [nn.BatchNorm2d(spec.in_channels, eps) for eps in (1e-5, 0.2)]
    scale = nn.Sequential(LayerScale2d(spec.in_channels, 0.5), Constant(-2.0))
    return rb.BranchConv([*norms, nn.Identity(), scale])


def pool_beside_norm(spec):
    """torch's own pooling, which pads by itself."""
    (top, _), (left, _) = spec.padding
    pool = nn.AvgPool2d(spec.kernel_size, spec.stride, (top, left))
    return rb.BranchConv([pool, nn.Sequential(conv(spec), nn.BatchNorm2d(spec.out_channels))])


def split(spec):
    widths = (spec.in_channels - 1, 1)
    parts = [conv_bn(spec.depthwise(width)) for width in widths]
    return rb.BranchConv([nn.Sequential(SplitConcat(parts, widths), nn.BatchNorm2d(spec.in_channels)), conv_bn(spec)])


KEEP_THE_MAP = {build.__name__: build for build in (identity_only, norm_only, norms_and_identity)}
DEPTHWISE_ONLY = {build.__name__: build for build in (pool_beside_norm, split)}
MIXTURES |= KEEP_THE_MAP | DEPTHWISE_ONLY
