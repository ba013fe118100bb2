"""RepVGG: plain stacks of 3x3 blocks that train with a 1x1 and an identity branch.

Source: Ding et al. 2021, "RepVGG: Making VGG-style ConvNets Great Again", https://arxiv.org/abs/2101.03697, table 2.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from repblocks.blocks import RepVGGBlock, options_of
from repblocks.foreign.repvgg import NAMES
from repblocks.models.layers import SqueezeExcite, drop_beside_identity
from repblocks.models.registry import CIFAR, configs, register
from repblocks.models.staged import Stage, StagedNet, StagePlan, plan_stages


class RepVGG(StagedNet):
    """A 3x3 stem, stages of 3x3 blocks, global pooling, a linear layer.

    Args:
        depths: Blocks per stage.
        widths: Channels per stage.
        strides: Stride of each stage's first block.
        stem_stride: Stride of the stem; its width is that of the first stage, at most 64.
        groups: Groups of every second block of a stage.
        se_ratio: Width of a squeeze-and-excitation layer between the sum and the activation, as a fraction of the
            channels; 0 for none.
        block: Name in ``BLOCKS`` of the linear block that the stem and the stages are made of.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of the image.
        global_pool: timm's pooling name.
        output_stride: 8, 16 or 32; strides beyond it become dilation.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first one. It drops each
            convolution branch that runs beside an identity branch, which the paper does not do.

    Raises:
        ConfigurationError: An unknown ``block``, an ``output_stride`` that is not supported, or stochastic depth of
            blocks without an identity branch.
    """

    foreign = NAMES

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        stem_stride: int,
        groups: int = 1,
        se_ratio: float = 0.0,
        block: str = "repvgg",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        stem_width = min(64, widths[0])
        plans = plan_stages(
            depths=depths,
            widths=widths,
            strides=strides,
            stem_width=stem_width,
            stem_stride=stem_stride,
            output_stride=output_stride,
            drop_path_rate=drop_path_rate,
        )
        se_layer = partial(SqueezeExcite, ratio=se_ratio) if se_ratio else None
        make_block = partial(RepVGGBlock, block=block, se_layer=se_layer)
        super().__init__(
            make_block(in_chans, stem_width, stride=stem_stride, groups=1),
            [_stage(plan, make_block, groups, options_of(block, identity=plan.identity)) for plan in plans],
            plans=plans,
            stem_stride=stem_stride,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        if drop_path_rate:
            rates = [rate for plan in plans for rate in plan.drop_paths]
            drop_beside_identity((block for stage in self.stages for block in stage.children()), rates)


def _stage(plan: StagePlan, make_block: partial[RepVGGBlock], groups: int, first: Mapping[str, Any]) -> Stage:
    """Blocks in a row, the first with options of its own."""
    return Stage(
        *(
            make_block(
                channels,
                plan.out_channels,
                stride=stride,
                dilation=dilation,
                groups=groups if i % 2 else 1,
                **({} if i else first),
            )
            for i, (channels, stride, dilation) in enumerate(plan.layers())
        )
    )


_IMAGENET = {"strides": (2, 2, 2, 2), "stem_stride": 2}
_A = _IMAGENET | {"depths": (2, 4, 14, 1)}
_B = _IMAGENET | {"depths": (4, 6, 16, 1)}
_B1 = _B | {"widths": (128, 256, 512, 2048)}
_B2 = _B | {"widths": (160, 320, 640, 2560)}
_B3 = _B | {"widths": (192, 384, 768, 2560)}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rb_repvgg_a0": _A | {"widths": (48, 96, 192, 1280)},
    "rb_repvgg_a1": _A | {"widths": (64, 128, 256, 1280)},
    "rb_repvgg_a2": _A | {"widths": (96, 192, 384, 1408)},
    "rb_repvgg_b0": _B | {"widths": (64, 128, 256, 1280)},
    "rb_repvgg_b1": _B1,
    "rb_repvgg_b1g2": _B1 | {"groups": 2},
    "rb_repvgg_b1g4": _B1 | {"groups": 4},
    "rb_repvgg_b2": _B2,
    "rb_repvgg_b2g2": _B2 | {"groups": 2},
    "rb_repvgg_b2g4": _B2 | {"groups": 4},
    "rb_repvgg_b3": _B3,
    "rb_repvgg_b3g2": _B3 | {"groups": 2},
    "rb_repvgg_b3g4": _B3 | {"groups": 4},
    "rb_repvgg_d2se": _B2 | {"depths": (8, 14, 24, 1), "se_ratio": 1 / 16},
    "rb_repvgg_cifar": {"depths": (2, 3, 2), "widths": (32, 64, 128), "strides": (2, 2, 2), "stem_stride": 1},
}

# Names of the training form; they say which weights change with the number of input channels.
_RECIPE = {
    "first_conv": ("stem.conv.branches.kxk.0", "stem.conv.branches.pointwise.0"),
    "interpolation": "bilinear",
}

default_cfgs = configs(
    ARCHITECTURES,
    _RECIPE,
    rb_repvgg_d2se={"input_size": (3, 320, 320), "pool_size": (10, 10), "crop_pct": 1.0},
    rb_repvgg_cifar=CIFAR,
)

for _name, _architecture in ARCHITECTURES.items():
    register(_name, RepVGG, _architecture)
