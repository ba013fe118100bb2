"""RepNeXt-M: a mobile network whose token mixers give each quarter of the channels its own kernel sizes.

Not this project's RepNeXt (``rb_repnext_*``), which shares the name only.

Source: Zhao et al. 2024, "RepNeXt: A Fast Multi-Scale CNN using Structural Reparameterization",
https://arxiv.org/abs/2406.16004, section 3.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from repblocks.blocks import BranchConv, ConvBN, RepBlock, RepNeXtMConv, RepNeXtMSmallConv, options_of, resolve_block
from repblocks.blocks.base import Children, RepConv
from repblocks.errors import ConfigurationError
from repblocks.foreign.repnextm import NAMES
from repblocks.models.distilled import DistilledNet, normed_classifier
from repblocks.models.layers import PatchStem
from repblocks.models.registry import configs, register
from repblocks.models.staged import Stage, StagePlan, plan_stages

MakeMedium = Callable[..., RepConv]
EXPANSION = 2
STEM_STRIDE = 4


class RepNeXtM(DistilledNet):
    """A stem of two 3x3s, stages of `RepNeXtMBlock` with `RepNeXtMDownsample` between them, a pooled double classifier.

    Not `RepNeXt`, which is another network.

    Args:
        depths: Blocks per stage, without the downsampling layer.
        widths: Channels per stage, multiples of 4, doubling where a stage strides; the stem has the first one.
        strides: Stride of the downsampling layer before each stage; 1 for none.
        block: Name in ``BLOCKS`` of the depthwise linear block that stands for the medium unit; one that brings its
            own norm keeps it.
        distillation: Whether the classifier has a second head, which can learn from a teacher; the authors' always has.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of the image.
        global_pool: timm's pooling name.
        output_stride: 8, 16 or 32; strides beyond it become dilation.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first one, and a
            downsampling layer has that of the block behind it. The authors have none.

    Raises:
        ConfigurationError: An unknown ``block``, an ``output_stride`` that is not supported, or widths that do not fit.
    """

    foreign = NAMES

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        block: str = "repnextm",
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
            stem_stride=STEM_STRIDE,
            output_stride=output_stride,
            drop_path_rate=drop_path_rate,
        )
        _require_widths(plans)
        super().__init__(
            PatchStem(in_chans, widths[0]),
            [_stage(plan, block) for plan in plans],
            plans=plans,
            stem_stride=STEM_STRIDE,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            make_classifier=normed_classifier(distillation=distillation),
        )


class RepNeXtMTokenMixer(nn.Module):
    """Four kernel sizes, one per quarter of the channels: none, the small unit, the medium one, 1x11 then 11x1.

    The last pair stays two convolutions: the zeros that surround the bias of its first one fit no single kernel.

    Args:
        channels: Of input and output, a multiple of 4.
        dilation: Of every kernel.
        make_medium: Makes the medium unit.
    """

    def __init__(self, channels: int, *, dilation: int, make_medium: MakeMedium) -> None:
        super().__init__()
        part = channels // 4
        self.small = RepNeXtMSmallConv(part, dilation=dilation)
        self.medium = make_medium(part, part, 7, dilation=dilation, groups=part)
        strip = partial(nn.Conv2d, part, part, dilation=dilation, groups=part)
        self.large = nn.Sequential(strip((1, 11), padding=(0, 5 * dilation)), strip((11, 1), padding=(5 * dilation, 0)))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        kept, small, medium, large = x.chunk(4, dim=1)
        return torch.cat([kept, self.small(small), self.medium(medium), self.large(large)], dim=1)


class RepNeXtMChannelMixer(nn.Module):
    """``project(gelu(expand(x)))``, both 1x1 with BatchNorm.

    Args:
        channels: C; twice as many in between.
        expand: The first 1x1, C -> 2C.
    """

    def __init__(self, channels: int, expand: RepConv) -> None:
        super().__init__()
        self.expand = expand
        self.act = nn.GELU()
        self.project = ConvBN(EXPANSION * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        return self.project(self.act(self.expand(x)))


class RepNeXtMBlock(RepBlock):
    """``x + drop_path(channel_mixer(BN(token_mixer(x))))``; in deploy form that BatchNorm is part of the first 1x1.

    Args:
        channels: C, a multiple of 4.
        dilation: Of the token mixer.
        drop_path: Probability of dropping the branch for a sample, in training.
        make_medium: Makes the medium unit.
    """

    def __init__(self, channels: int, *, dilation: int, drop_path: float, make_medium: MakeMedium) -> None:
        super().__init__()
        self.token_mixer = RepNeXtMTokenMixer(channels, dilation=dilation, make_medium=make_medium)
        normed = _chain(nn.BatchNorm2d(channels), ConvBN(channels, EXPANSION * channels, 1))
        self.channel_mixer = RepNeXtMChannelMixer(channels, normed)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        y = self.channel_mixer(self.token_mixer(x))
        return x + (self.drop_path(y) if self.form == "train" else y)

    def deploy_children(self) -> Children:
        """No drop path."""
        return {"drop_path": None}


class RepNeXtMDownsample(RepBlock):
    """``y + drop_path(channel_mixer(y))`` of ``y = BN(cat(small(x), medium(x)))``: C -> 2C.

    The two units have a half of that BatchNorm each, so that it folds into them.

    Args:
        in_channels: C.
        stride: Of the units.
        dilation: Of the units.
        drop_path: Probability of dropping the branch for a sample, in training.
        make_medium: Makes the medium unit.
    """

    def __init__(
        self, in_channels: int, *, stride: int, dilation: int, drop_path: float, make_medium: MakeMedium
    ) -> None:
        super().__init__()
        geometry: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": in_channels}
        small = RepNeXtMSmallConv(in_channels, lines="serial", **geometry)
        self.small = _chain(small, nn.BatchNorm2d(in_channels))
        self.medium = _chain(make_medium(in_channels, in_channels, 7, **geometry), nn.BatchNorm2d(in_channels))
        width = 2 * in_channels
        self.channel_mixer = RepNeXtMChannelMixer(width, ConvBN(width, EXPANSION * width, 1))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, 2C, H / stride, W / stride]``."""
        x = torch.cat([self.small(x), self.medium(x)], dim=1)
        y = self.channel_mixer(x)
        return x + (self.drop_path(y) if self.form == "train" else y)

    def deploy_children(self) -> Children:
        """No drop path."""
        return {"drop_path": None}


def _chain(*layers: nn.Module) -> RepConv:
    return BranchConv({"chain": nn.Sequential(*layers)})


def _stage(plan: StagePlan, block: str) -> Stage:
    make_medium = partial(RepNeXtMConv, norm_layer=None) if block == "repnextm" else resolve_block(block)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if plan.taps_input:
        layers["downsample"] = RepNeXtMDownsample(
            plan.in_channels,
            stride=plan.stride,
            dilation=plan.first_dilation,
            drop_path=plan.drop_paths[0],
            make_medium=partial(make_medium, **options_of(block, identity=plan.identity)),
        )
    for i, drop_path in enumerate(plan.drop_paths):
        layers[str(i)] = RepNeXtMBlock(
            plan.out_channels, dilation=plan.dilation, drop_path=drop_path, make_medium=make_medium
        )
    return Stage(layers)


def _require_widths(plans: Sequence[StagePlan]) -> None:
    for plan in plans:
        expected = 2 * plan.in_channels if plan.taps_input else plan.in_channels
        if plan.out_channels != expected or plan.out_channels % 4:
            raise ConfigurationError(
                f"a stage of {plan.out_channels} channels after {plan.in_channels}: needed are multiples of 4, "
                "twice as many where the stage strides, else as many"
            )


_STAGES = {"strides": (1, 2, 2, 2)}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rb_repnextm_m1": _STAGES | {"depths": (3, 3, 15, 2), "widths": (48, 96, 192, 384)},
    "rb_repnextm_m2": _STAGES | {"depths": (3, 3, 15, 2), "widths": (56, 112, 224, 448)},
    "rb_repnextm_m3": _STAGES | {"depths": (3, 3, 13, 2), "widths": (64, 128, 256, 512)},
    "rb_repnextm_m4": _STAGES | {"depths": (5, 5, 25, 4), "widths": (64, 128, 256, 512)},
    "rb_repnextm_m5": _STAGES | {"depths": (7, 7, 35, 2), "widths": (80, 160, 320, 640)},
}

# Names of the training form.
_NAMED = {
    "first_conv": "stem.conv1.branches.0",
    "classifier": ("head.fc.branches.main.1", "head.fc.branches.distilled.1"),
}

default_cfgs = configs(ARCHITECTURES, _NAMED)

for _name, _architecture in ARCHITECTURES.items():
    register(_name, RepNeXtM, _architecture)
