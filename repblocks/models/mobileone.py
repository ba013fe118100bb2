"""MobileOne: pairs of a depthwise 3x3 and a pointwise layer, each of which trains with several branches.

Source: Vasu et al. 2023, "MobileOne: An Improved One millisecond Mobile Backbone", https://arxiv.org/abs/2206.04040,
tables 2 and 3.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from repblocks.blocks import RepVGGBlock, options_of
from repblocks.blocks.spec import Identity
from repblocks.errors import ConfigurationError
from repblocks.foreign.mobileone import NAMES
from repblocks.models.layers import SqueezeExcite, drop_beside_identity
from repblocks.models.registry import configs, register
from repblocks.models.staged import Stage, StagedNet, StagePlan, plan_stages


class MobileOne(StagedNet):
    """A 3x3 stem, stages of depthwise 3x3 and pointwise layers in turn, global pooling, a linear layer.

    Strides beyond ``output_stride`` become dilation of the depthwise layers; timm's MobileOne removes those strides
    too, but does not dilate.

    Args:
        depths: Pairs per stage; a stage has twice as many layers.
        widths: Channels per stage.
        strides: Stride of each stage's first layer, a depthwise one.
        stem_stride: Stride of the stem; its width is that of the first stage, at most 64.
        num_conv_branches: Copies of the convolution in each layer of the stages, for a ``block`` that has copies; the
            stem has one.
        se_pairs: How many of the last pairs of each stage have squeeze-and-excitation, in both layers between the sum
            and the activation; empty for none.
        se_ratio: Its width as a fraction of the channels.
        block: Name in ``BLOCKS`` of the linear block that all layers are made of.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of the image.
        global_pool: timm's pooling name.
        output_stride: 8, 16 or 32.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last layer; it grows linearly from 0 at the first one. It drops each
            convolution branch that runs beside an identity branch, by itself, where timm drops their sum; the paper
            drops nothing.

    Raises:
        ConfigurationError: An unknown ``block``, or one that has no pointwise or depthwise form, an ``output_stride``
            that is not supported, ``se_pairs`` that are not one per stage, or stochastic depth of blocks without an
            identity branch.
    """

    foreign = NAMES

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        stem_stride: int,
        num_conv_branches: int = 1,
        se_pairs: Sequence[int] = (),
        se_ratio: float = 1 / 16,
        block: str = "mobileone",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        stem_width = min(64, widths[0])
        plans = plan_stages(
            depths=[2 * depth for depth in depths],
            widths=widths,
            strides=strides,
            stem_width=stem_width,
            stem_stride=stem_stride,
            output_stride=output_stride,
            drop_path_rate=drop_path_rate,
        )
        make_layer = partial(_layer, block=block, num_conv_branches=num_conv_branches)
        se_layer = partial(SqueezeExcite, ratio=se_ratio)
        super().__init__(
            _layer(in_chans, stem_width, block=block, num_conv_branches=1, stride=stem_stride),
            [
                _stage(plan, make_layer, se_layer, pairs)
                for plan, pairs in zip(plans, _per_stage(se_pairs, len(depths)), strict=True)
            ],
            plans=plans,
            stem_stride=stem_stride,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        if drop_path_rate:
            rates = [rate for plan in plans for rate in plan.drop_paths]
            drop_beside_identity((layer for stage in self.stages for layer in stage.children()), rates)


def _per_stage(se_pairs: Sequence[int], stages: int) -> Sequence[int]:
    if se_pairs and len(se_pairs) != stages:
        raise ConfigurationError(f"got {len(se_pairs)} se_pairs for {stages} stages; give one of each per stage")
    return se_pairs or [0] * stages


def _layer(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    block: str,
    num_conv_branches: int,
    identity: Identity = "auto",
    **arguments: Any,
) -> RepVGGBlock:
    options = options_of(block, num_conv_branches=num_conv_branches, identity=identity)
    return RepVGGBlock(in_channels, out_channels, kernel_size, block=block, **options, **arguments)


def _stage(
    plan: StagePlan, make_layer: Callable[..., RepVGGBlock], se_layer: Callable[[int], nn.Module], se_pairs: int
) -> Stage:
    """Pairs of layers, of which the last ``se_pairs`` have squeeze-and-excitation."""
    pairs = len(plan.drop_paths) // 2
    layers: list[RepVGGBlock] = []
    for pair, (channels, stride, dilation) in zip(range(pairs), plan.layers(), strict=False):
        make = partial(make_layer, se_layer=se_layer if pair >= pairs - se_pairs else None)
        identity = "auto" if pair else plan.identity
        layers += [
            make(channels, channels, stride=stride, dilation=dilation, groups=channels, identity=identity),
            make(channels, plan.out_channels, 1),
        ]
    return Stage(*layers)


_COMMON = {"depths": (2, 8, 10, 1), "strides": (2, 2, 2, 2), "stem_stride": 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rb_mobileone_s0": _COMMON | {"widths": (48, 128, 256, 1024), "num_conv_branches": 4},
    "rb_mobileone_s1": _COMMON | {"widths": (96, 192, 512, 1280)},
    "rb_mobileone_s2": _COMMON | {"widths": (96, 256, 640, 2048)},
    "rb_mobileone_s3": _COMMON | {"widths": (128, 320, 768, 2048)},
    "rb_mobileone_s4": _COMMON | {"widths": (192, 448, 896, 2048), "se_pairs": (0, 0, 5, 1)},
}

# Names of the training form; they say which weights change with the number of input channels.
_RECIPE = {"first_conv": ("stem.conv.branches.kxk0.0", "stem.conv.branches.pointwise.0")}

default_cfgs = configs(ARCHITECTURES, _RECIPE)

for _name, _architecture in ARCHITECTURES.items():
    register(_name, MobileOne, _architecture)
