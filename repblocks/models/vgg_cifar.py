"""VGG-16 with BatchNorm for 32x32 images, each of its 3x3 layers any linear block.

Source: Simonyan & Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
https://arxiv.org/abs/1409.1556, table 1, column D; the small classifier as in the repository of Ding et al. 2019,
"ACNet", https://arxiv.org/abs/1908.03930.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from repblocks.blocks import RepVGGBlock
from repblocks.models.layers import drop_beside_identity
from repblocks.models.registry import CIFAR, configs, register
from repblocks.models.staged import Stage, StagedNet, StagePlan, plan_stages


class MaxPool(nn.Module):
    """The maximum of 2x2 pixels; with stride 1 it keeps the grid, as if the map ended in minus infinity.

    Args:
        stride: 2, or 1 in a dilated network.
        dilation: Distance of the pixels.
    """

    def __init__(self, *, stride: int = 2, dilation: int = 1) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C, H / stride, W / stride]``, rounded down."""
        reach = self.dilation if self.stride == 1 else 0
        x = nn.functional.pad(x, (0, reach, 0, reach), value=-float("inf"))
        return nn.functional.max_pool2d(x, 2, self.stride, dilation=self.dilation)

    def extra_repr(self) -> str:
        """The geometry."""
        return f"stride={self.stride}, dilation={self.dilation}"


class VGGCifar(StagedNet):
    """A 3x3 stem, stages of 3x3 layers with max pooling before each strided one, global pooling, two linear layers.

    On the 32x32 images of the default ``rb_vgg16_cifar`` the last map is 2x2, so the global maximum is VGG's fifth
    max pooling; larger images are taken too.

    Args:
        depths: 3x3 layers per stage, the stem not counted.
        widths: Channels per stage; the stem has the first one.
        strides: 2 for a stage that begins with max pooling, else 1.
        stem_stride: Stride of the stem.
        hidden_features: Width of the hidden linear layer.
        block: Name in ``BLOCKS`` of the linear block that the stem and the stages are made of.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of the image.
        global_pool: timm's pooling name, other than those that widen the map.
        output_stride: 8, 16 or 32; strides beyond it become dilation.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last layer; it grows linearly from 0 at the first one. It drops each
            convolution branch that runs beside an identity branch, which the papers do not do.

    Raises:
        ConfigurationError: An unknown ``block``, an ``output_stride`` or a pooling that is not supported, or stochastic
            depth of blocks without an identity branch, such as ``block="plain"``.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        stem_stride: int,
        hidden_features: int = 512,
        block: str = "plain",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "max",
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
        make_layer = partial(RepVGGBlock, block=block)
        super().__init__(
            make_layer(in_chans, widths[0], stride=stem_stride),
            [_stage(plan, make_layer) for plan in plans],
            plans=plans,
            stem_stride=stem_stride,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            neck=nn.Sequential(nn.Conv2d(widths[-1], hidden_features, 1), nn.ReLU()),
            hidden_features=hidden_features,
        )
        if drop_path_rate:
            layers = (layer for stage in self.stages for layer in stage.children() if isinstance(layer, RepVGGBlock))
            drop_beside_identity(layers, [rate for plan in plans for rate in plan.drop_paths])


def _stage(plan: StagePlan, make_layer: partial[RepVGGBlock]) -> Stage:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if plan.taps_input:
        layers["downsample"] = MaxPool(stride=plan.stride, dilation=plan.first_dilation)
    for i, (channels, _, _) in enumerate(plan.layers()):
        layers[str(i)] = make_layer(channels, plan.out_channels, dilation=plan.dilation)
    return Stage(layers)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rb_vgg16_cifar": {
        "depths": (1, 2, 3, 3, 3),
        "widths": (64, 128, 256, 512, 512),
        "strides": (1, 2, 2, 2, 2),
        "stem_stride": 1,
    },
}

default_cfgs = configs(ARCHITECTURES, CIFAR | {"pool_size": (2, 2), "first_conv": "stem.conv.branches.0"})

for _name, _architecture in ARCHITECTURES.items():
    register(_name, VGGCifar, _architecture)
