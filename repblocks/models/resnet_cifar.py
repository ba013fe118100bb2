"""ResNet for 32x32 images: pairs of 3x3 layers beside a shortcut, each layer any linear block.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385, section 4.2;
with blocks in place of the convolutions as in Ding et al. 2019, "ACNet", https://arxiv.org/abs/1908.03930.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from repblocks.blocks import ConvBN, RepBlock, RepVGGBlock, options_of, resolve_block
from repblocks.blocks.base import Children
from repblocks.blocks.spec import Identity
from repblocks.models.registry import CIFAR, configs, register
from repblocks.models.staged import Stage, StagedNet, StagePlan, plan_stages


class ResidualBlock(RepBlock):
    """``relu(shortcut(x) + drop_path(conv2(conv1(x))))``, where ``conv1`` ends in a ReLU of its own.

    Args:
        in_channels: Channels of x.
        out_channels: Channels of the result.
        block: Short name in ``BLOCKS`` of both 3x3 layers.
        stride: Of the first layer.
        first_dilation: Of the first layer.
        dilation: Of the second layer.
        identity: Whether the first layer may have an identity branch, if its block knows one.
        projects: Whether the shortcut is a 1x1 convolution and a BatchNorm, instead of x.
        drop_path: Probability of dropping the two layers for a sample, in training.

    Raises:
        ConfigurationError: An unknown ``block``.

    Source: He et al. 2016, https://arxiv.org/abs/1512.03385, figure 2 and option B of section 3.3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        block: str = "plain",
        stride: int = 1,
        first_dilation: int = 1,
        dilation: int = 1,
        identity: Identity = "auto",
        projects: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        options = options_of(block, identity=identity)
        self.conv1 = RepVGGBlock(
            in_channels, out_channels, block=block, stride=stride, dilation=first_dilation, **options
        )
        self.conv2 = resolve_block(block)(out_channels, out_channels, 3, dilation=dilation)
        self.shortcut = ConvBN(in_channels, out_channels, 1, stride=stride) if projects else None
        self.drop_path = DropPath(drop_path)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H / stride, W / stride]``."""
        y = self.conv2(self.conv1(x))
        if self.form == "train":
            y = self.drop_path(y)
        return self.act((x if self.shortcut is None else self.shortcut(x)) + y)

    def deploy_children(self) -> Children:
        """Without drop path; the layers collapse by themselves."""
        return {"drop_path": None}


class ResNetCifar(StagedNet):
    """A 3x3 stem, stages of `ResidualBlock`, global pooling, a linear layer.

    Where a stage changes the resolution or the channels its first shortcut is a 1x1 convolution and a BatchNorm
    (option B), as in ACNet's repository; He et al. use option A on CIFAR, strided slices padded with zero channels,
    which has no weights. The shortcuts stay plain whatever ``block`` is.

    Args:
        depths: Blocks per stage; He et al. have the same number n in each, which makes 6n + 2 layers.
        widths: Channels per stage; the stem has the first one.
        strides: Stride of each stage's first block.
        stem_stride: Stride of the stem.
        block: Name in ``BLOCKS`` of the linear block that the stem and the 3x3 layers are made of.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of the image.
        global_pool: timm's pooling name.
        output_stride: 8, 16 or 32; strides beyond it become dilation.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first one.

    Raises:
        ConfigurationError: An unknown ``block``, or an ``output_stride`` that is not supported.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        stem_stride: int,
        block: str = "plain",
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
        make_block = partial(ResidualBlock, block=block)
        super().__init__(
            RepVGGBlock(in_chans, widths[0], block=block, stride=stem_stride),
            [_stage(plan, make_block) for plan in plans],
            plans=plans,
            stem_stride=stem_stride,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


def _stage(plan: StagePlan, make_block: partial[ResidualBlock]) -> Stage:
    """Blocks in a row, the first with what changes the shape of the map."""
    first: dict[str, Any] = {
        "identity": plan.identity,
        "projects": plan.taps_input or plan.in_channels != plan.out_channels,
    }
    geometry = zip(plan.layers(), plan.drop_paths, strict=True)
    return Stage(
        *(
            make_block(
                channels,
                plan.out_channels,
                stride=stride,
                first_dilation=dilation,
                dilation=plan.dilation,
                drop_path=drop_path,
                **({} if i else first),
            )
            for i, ((channels, stride, dilation), drop_path) in enumerate(geometry)
        )
    )


_CIFAR = {"widths": (16, 32, 64), "strides": (1, 2, 2), "stem_stride": 1}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rb_resnet20_cifar": _CIFAR | {"depths": (3, 3, 3)},
    "rb_resnet56_cifar": _CIFAR | {"depths": (9, 9, 9)},
}

default_cfgs = configs(ARCHITECTURES, CIFAR | {"pool_size": (8, 8), "first_conv": "stem.conv.branches.0"})

for _name, _architecture in ARCHITECTURES.items():
    register(_name, ResNetCifar, _architecture)
