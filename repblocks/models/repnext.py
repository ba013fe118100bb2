"""RepNeXt: ConvNeXt's layout with a depthwise layer of several kernel sizes and shortcuts that collapse as well.

Source: the structural re-parameterization of shortcuts around pointwise-activation-pointwise chains; layout after Liu
et al. 2022, "A ConvNet for the 2020s", https://arxiv.org/abs/2201.03545.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from repblocks.blocks import BNConv, ConvBN, RepNeXtBlock
from repblocks.foreign.repnext import NAMES
from repblocks.models.registry import CIFAR, configs, register
from repblocks.models.staged import Stage, StagedNet, StagePlan, plan_stages


class RepNeXt(StagedNet):
    """A patch stem, stages of ``RepNeXtBlock`` with BN-conv downsampling between them, global pooling, a linear layer.

    Args:
        depths: Blocks per stage.
        widths: Channels per stage; the stem has the first one.
        strides: Stride of the downsampling layer before each stage; 1 for none.
        stem_stride: Stride of the stem: its patch size, or a 3x3 stem if it is 1.
        block: Name in ``BLOCKS`` of the linear block that mixes pixels.
        shortcut: Whether the deploy form absorbs the blocks' shortcuts into their convs or keeps them.
        pointwise: Whether the blocks' 1x1s run as convs or as linear layers.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of the image.
        global_pool: timm's pooling name.
        output_stride: 8, 16 or 32; strides beyond it become dilation.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first one.

    Raises:
        ConfigurationError: An ``output_stride`` that is not supported.
    """

    foreign = NAMES

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        stem_stride: int,
        block: str = "repunit",
        shortcut: Literal["absorb", "keep"] = "absorb",
        pointwise: Literal["conv", "linear"] = "conv",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        plans = plan_stages(
            depths=depths,
            widths=widths,
            strides=strides,
            stem_width=widths[0],
            stem_stride=stem_stride,
            output_stride=output_stride,
            drop_path_rate=drop_path_rate,
        )
        make_block = partial(RepNeXtBlock, block=block, shortcut=shortcut, pointwise=pointwise)
        super().__init__(
            _stem(in_chans, widths[0], stem_stride),
            [_stage(plan, make_block) for plan in plans],
            plans=plans,
            stem_stride=stem_stride,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.stem.apply(_init_weights)
        self.stages.apply(_init_weights)


def _stem(in_chans: int, width: int, stride: int) -> ConvBN:
    return ConvBN(in_chans, width, 3) if stride == 1 else ConvBN(in_chans, width, stride, stride=stride, padding=0)


def _stage(plan: StagePlan, make_block: partial[RepNeXtBlock]) -> Stage:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if plan.taps_input:
        layers["downsample"] = BNConv(
            plan.in_channels, plan.out_channels, 2, stride=plan.stride, dilation=plan.first_dilation
        )
    for i, drop_path in enumerate(plan.drop_paths):
        layers[str(i)] = make_block(plan.out_channels, dilation=plan.dilation, drop_path=drop_path)
    return Stage(layers)


def _init_weights(module: nn.Module) -> None:
    """As ConvNeXt starts: truncated normal weights of standard deviation 0.02, zero biases; fixed filters stay."""
    if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(module.weight, nn.Parameter):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_U3 = {"strides": (1, 2, 2, 2), "stem_stride": 4}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rb_repnext_u3_tiny": _U3 | {"depths": (3, 3, 9, 3), "widths": (96, 192, 384, 768)},
    "rb_repnext_u3_small": _U3 | {"depths": (3, 3, 27, 3), "widths": (96, 192, 384, 768)},
    "rb_repnext_u3_base": _U3 | {"depths": (3, 3, 27, 3), "widths": (128, 256, 512, 1024)},
    "rb_repnext_cifar": {"depths": (2, 2, 2), "widths": (32, 64, 128), "strides": (2, 2, 2), "stem_stride": 1},
}

default_cfgs = configs(ARCHITECTURES, {"first_conv": "stem.branches.0"}, rb_repnext_cifar=CIFAR)

for _name, _architecture in ARCHITECTURES.items():
    register(_name, RepNeXt, _architecture)
