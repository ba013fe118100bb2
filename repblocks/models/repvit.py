"""RepViT: a mobile vision transformer's layout, made of convolutions that collapse.

Source: Wang et al. 2024, "RepViT: Revisiting Mobile CNN From ViT Perspective", https://arxiv.org/abs/2307.09283,
section 3.5.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath, make_divisible  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from repblocks.blocks import ConvBN, RepBlock, resolve_block
from repblocks.blocks.base import Children
from repblocks.foreign.repvit import NAMES
from repblocks.models.distilled import DistilledNet, normed_classifier
from repblocks.models.layers import PatchStem, SqueezeExcite
from repblocks.models.registry import configs, register
from repblocks.models.staged import Stage, StagePlan, plan_stages


class ChannelMixer(RepBlock):
    """``x + drop_path(conv2(gelu(conv1(x))))`` of two 1x1 convolutions, each with BatchNorm; starts as the identity.

    Args:
        channels: Of input and output; between the two there are twice as many.
        drop_path: Probability of dropping the branch for a sample, in training.

    Source: Wang et al. 2024, "RepViT", https://arxiv.org/abs/2307.09283, section 3.2.
    """

    def __init__(self, channels: int, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, 2 * channels, 1)
        self.act = nn.GELU()
        self.conv2 = ConvBN(2 * channels, channels, 1)
        nn.init.zeros_(self.conv2.get_parameter("branches.1.weight"))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        y = self.conv2(self.act(self.conv1(x)))
        return x + (self.drop_path(y) if self.form == "train" else y)

    def deploy_children(self) -> Children:
        """No drop path."""
        return {"drop_path": None}


class RepViTBlock(RepBlock):
    """``channel_mixer(se(token_mixer(x)))``: pixels are mixed channel by channel, then channels pixel by pixel.

    Args:
        channels: C.
        block: Short name in ``BLOCKS`` of the depthwise token mixer.
        dilation: Of the token mixer.
        se: Whether squeeze-and-excitation stands between the two.
        drop_path: Stochastic depth of the channel mixer.

    Source: Wang et al. 2024, "RepViT", https://arxiv.org/abs/2307.09283, sections 3.2 and 3.4.
    """

    def __init__(
        self, channels: int, *, block: str = "repvit", dilation: int = 1, se: bool = False, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.token_mixer = resolve_block(block)(channels, channels, 3, groups=channels, dilation=dilation)
        self.se = _squeeze_excite(channels) if se else None
        self.channel_mixer = ChannelMixer(channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        x = self.token_mixer(x)
        return self.channel_mixer(x if self.se is None else self.se(x))


class RepViTDownsample(RepBlock):
    """A block, then a strided depthwise and a 1x1 convolution, each with BatchNorm, and a channel mixer.

    Args:
        in_channels: Of the block and the depthwise convolution.
        out_channels: Of the rest.
        block: Short name in ``BLOCKS`` of the block's token mixer.
        stride: Of the depthwise convolution.
        dilation: Of the block and the depthwise convolution.
        drop_path: Stochastic depth of both channel mixers.

    Source: Wang et al. 2024, "RepViT", https://arxiv.org/abs/2307.09283, section 3.3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        block: str = "repvit",
        stride: int = 2,
        dilation: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.pre_block = RepViTBlock(in_channels, block=block, dilation=dilation, drop_path=drop_path)
        self.spatial_downsample = ConvBN(
            in_channels, in_channels, 3, stride=stride, dilation=dilation, groups=in_channels
        )
        self.channel_downsample = ConvBN(in_channels, out_channels, 1)
        self.ffn = ChannelMixer(out_channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H / stride, W / stride]``."""
        x = self.spatial_downsample(self.pre_block(x))
        return self.ffn(self.channel_downsample(x))


class RepViT(DistilledNet):
    """A convolutional stem, stages of ``RepViTBlock`` with downsampling between them, pooling, a normed classifier.

    Args:
        depths: Blocks per stage, besides the one in each downsampling layer; every second one has
            squeeze-and-excitation, from the first.
        widths: Channels per stage; the stem has the first one.
        strides: Stride of the downsampling layer before each stage; 1 for none.
        block: Name in ``BLOCKS`` of the linear block that mixes pixels.
        distillation: Whether the classifier has a second head, which can learn from a teacher.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of the image.
        global_pool: timm's pooling name.
        output_stride: 8, 16 or 32; strides beyond it become dilation.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last channel mixer; it grows linearly from 0 at the first one, and a
            downsampling layer has that of the block behind it. The paper has none.

    Raises:
        ConfigurationError: An unknown ``block``, or an ``output_stride`` that is not supported.
    """

    foreign = NAMES

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        block: str = "repvit",
        distillation: bool = True,
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
            stem_stride=4,
            output_stride=output_stride,
            drop_path_rate=drop_path_rate,
        )
        super().__init__(
            PatchStem(in_chans, widths[0]),
            [_stage(plan, block) for plan in plans],
            plans=plans,
            stem_stride=4,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            make_classifier=normed_classifier(distillation=distillation),
        )


def _stage(plan: StagePlan, block: str) -> Stage:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if plan.taps_input:
        layers["downsample"] = RepViTDownsample(
            plan.in_channels,
            plan.out_channels,
            block=block,
            stride=plan.stride,
            dilation=plan.first_dilation,
            drop_path=plan.drop_paths[0],
        )
    for i, drop_path in enumerate(plan.drop_paths):
        layers[str(i)] = RepViTBlock(
            plan.out_channels, block=block, dilation=plan.dilation, se=i % 2 == 0, drop_path=drop_path
        )
    return Stage(layers)


def _squeeze_excite(channels: int) -> SqueezeExcite:
    """A quarter of the channels, rounded to a multiple of 8."""
    return SqueezeExcite(channels, ratio=make_divisible(channels / 4, 8, round_limit=0.0) / channels)


_IMAGENET = {"strides": (1, 2, 2, 2)}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rb_repvit_m0_9": _IMAGENET | {"depths": (2, 2, 14, 2), "widths": (48, 96, 192, 384)},
    "rb_repvit_m1_0": _IMAGENET | {"depths": (2, 2, 14, 2), "widths": (56, 112, 224, 448)},
    "rb_repvit_m1_1": _IMAGENET | {"depths": (2, 2, 12, 2), "widths": (64, 128, 256, 512)},
    "rb_repvit_m1_5": _IMAGENET | {"depths": (4, 4, 24, 4), "widths": (64, 128, 256, 512)},
    "rb_repvit_m2_3": _IMAGENET | {"depths": (6, 6, 34, 2), "widths": (80, 160, 320, 640)},
}

# Names of the training form; they say which weights change with the number of input channels and of classes.
_RECIPE = {
    "first_conv": "stem.conv1.branches.0",
    "classifier": ("head.fc.branches.main.1", "head.fc.branches.distilled.1"),
    "crop_pct": 0.95,
}

default_cfgs = configs(ARCHITECTURES, _RECIPE)

for _name, _architecture in ARCHITECTURES.items():
    register(_name, RepViT, _architecture)
