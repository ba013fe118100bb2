"""RepGhostNet: bottlenecks of RepGhost modules, whose parallel branches collapse into two convolutions each.

Source: Chen et al. 2022, "RepGhost: A Hardware-Efficient Ghost Module via Re-parameterization",
https://arxiv.org/abs/2211.06088, table 2.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from timm.layers import DropPath, make_divisible  # pyright: ignore[reportPrivateImportUsage]
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from repblocks.blocks import ConvBN, RepBlock, RepGhostModule, RepVGGBlock
from repblocks.blocks.base import Children
from repblocks.foreign.repghost import NAMES
from repblocks.models.registry import configs, register
from repblocks.models.staged import Stage, StagedNet, StagePlan, plan_stages


class Row(NamedTuple):
    """One bottleneck of the paper's table.

    Attributes:
        kernel_size: Of the depthwise convolutions that change the grid or, in the shortcut, the channels.
        hidden: Channels between its two modules, before they are scaled.
        out_channels: Channels that it gives, before they are scaled.
        se_ratio: Width inside squeeze-and-excitation relative to the hidden channels; 0 for none.
    """

    kernel_size: int
    hidden: int
    out_channels: int
    se_ratio: float

    def scaled(self, width: float) -> "Row":
        """With the channels times a factor, in multiples of 4."""
        return self._replace(hidden=_scaled(self.hidden, width), out_channels=_scaled(self.out_channels, width))


class RepGhostBottleneck(RepBlock):
    """``drop_path(ghost2(se(conv_dw(ghost1(x))))) + shortcut(x)``, the second module without activation.

    ``conv_dw`` is there for a stride only. Where input and output differ in shape, the shortcut is a depthwise and
    a 1x1 convolution, each with its BatchNorm, and nothing is dropped.

    Args:
        in_channels: Of ``x``.
        row: Channels, kernel size and squeeze-and-excitation.
        stride: Of ``conv_dw`` and the shortcut.
        strided: Whether there is a ``conv_dw`` at stride 1 too, because a dilation has taken the place of the stride.
        first_dilation: Of the depthwise convolutions on the grid of ``x``.
        dilation: Of those on the grid of the output.
        drop_path: Probability of dropping the branch for a sample, in training.

    Source: Chen et al. 2022, "RepGhost", https://arxiv.org/abs/2211.06088, section 3.3.
    """

    def __init__(
        self,
        in_channels: int,
        row: Row,
        *,
        stride: int = 1,
        strided: bool = False,
        first_dilation: int = 1,
        dilation: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        kernel_size, hidden, out_channels, se_ratio = row
        strided = strided or stride > 1
        depthwise = partial(_depthwise, kernel_size=kernel_size, stride=stride, dilation=first_dilation)
        self.ghost1 = RepGhostModule(in_channels, hidden, dilation=first_dilation)
        self.conv_dw = depthwise(hidden) if strided else None
        self.se = _squeeze_excite(hidden, se_ratio) if se_ratio else None
        self.ghost2 = RepGhostModule(hidden, out_channels, dilation=dilation, act_layer=None)
        self.shortcut = None
        if strided or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                depthwise(in_channels),
                ConvBN(in_channels, out_channels, 1),
            )
        self.drop_path = DropPath(0.0 if self.shortcut else drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""
        y = self.ghost1(x)
        y = y if self.conv_dw is None else self.conv_dw(y)
        y = self.ghost2(y if self.se is None else self.se(y))
        y = self.drop_path(y) if self.form == "train" else y
        return y + (x if self.shortcut is None else self.shortcut(x))

    def deploy_children(self) -> Children:
        """Nothing in place of drop path; the rest switches by itself."""
        return {"drop_path": None}


class RepGhostNet(StagedNet):
    """A 3x3 stem, stages of `RepGhostBottleneck`, a 1x1 convolution, global pooling, a hidden and a linear layer.

    Args:
        bottlenecks: Per stage one `Row` for each bottleneck: kernel size, hidden channels, channels, SE ratio.
        strides: Stride of each stage's first bottleneck.
        stem_stride: Stride of the stem, which has 16 channels before scaling.
        width: Factor of all channels but those of the hidden layer, 1280.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of the image.
        global_pool: timm's pooling name; none that changes the number of channels, which the hidden layer reads.
        output_stride: 8, 16 or 32; strides beyond it become dilation of the depthwise convolutions.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last bottleneck; it grows linearly from 0 at the first one. It drops
            the branch where the shortcut is the identity, which the paper does not do.

    Raises:
        ConfigurationError: An ``output_stride`` or a pooling that is not supported.
    """

    foreign = NAMES

    def __init__(
        self,
        *,
        bottlenecks: Sequence[Sequence[tuple[int, int, int, float]]],
        strides: Sequence[int],
        stem_stride: int,
        width: float = 1.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
    ) -> None:
        rows = [[Row(*row).scaled(width) for row in stage] for stage in bottlenecks]
        stem_width, last_width = _scaled(16, width), _scaled(2 * bottlenecks[-1][-1][1], width)
        plans = plan_stages(
            depths=[len(stage) for stage in rows],
            widths=[*(stage[-1].out_channels for stage in rows[:-1]), last_width],
            strides=strides,
            stem_width=stem_width,
            stem_stride=stem_stride,
            output_stride=output_stride,
            drop_path_rate=drop_path_rate,
        )
        stages = [Stage(*_bottlenecks(plan, stage)) for plan, stage in zip(plans, rows, strict=True)]
        stages[-1].append(RepVGGBlock(rows[-1][-1].out_channels, last_width, 1, block="plain"))
        super().__init__(
            RepVGGBlock(in_chans, stem_width, 3, block="plain", stride=stem_stride),
            stages,
            plans=plans,
            stem_stride=stem_stride,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            neck=nn.Sequential(nn.Conv2d(last_width, _HIDDEN_FEATURES, 1), nn.ReLU()),
            hidden_features=_HIDDEN_FEATURES,
        )


def _bottlenecks(plan: StagePlan, rows: Sequence[Row]) -> Iterator[RepGhostBottleneck]:
    """The bottlenecks of a stage; their channels vary inside it."""
    channels = plan.in_channels
    for (_, stride, first_dilation), row, drop_path in zip(plan.layers(), rows, plan.drop_paths, strict=True):
        yield RepGhostBottleneck(
            channels,
            row,
            stride=stride,
            strided=plan.taps_input and row is rows[0],
            first_dilation=first_dilation,
            dilation=plan.dilation,
            drop_path=drop_path,
        )
        channels = row.out_channels


def _depthwise(channels: int, *, kernel_size: int, stride: int, dilation: int) -> ConvBN:
    return ConvBN(channels, channels, kernel_size, stride=stride, dilation=dilation, groups=channels)


def _squeeze_excite(channels: int, ratio: float) -> SqueezeExcite:
    return SqueezeExcite(channels, rd_channels=_scaled(channels, ratio), gate_layer="hard_sigmoid")


def _scaled(channels: int, factor: float) -> int:
    return int(make_divisible(channels * factor, 4))


_HIDDEN_FEATURES = 1280

_BOTTLENECKS = (
    ((3, 8, 16, 0.0),),
    ((3, 24, 24, 0.0), (3, 36, 24, 0.0)),
    ((5, 36, 40, 0.25), (5, 60, 40, 0.25)),
    (
        (3, 120, 80, 0.0),
        (3, 100, 80, 0.0),
        (3, 120, 80, 0.0),
        (3, 120, 80, 0.0),
        (3, 240, 112, 0.25),
        (3, 336, 112, 0.25),
    ),
    ((5, 336, 160, 0.25), (5, 480, 160, 0.0), (5, 480, 160, 0.25), (5, 480, 160, 0.0), (5, 480, 160, 0.25)),
)
_BASE = {"bottlenecks": _BOTTLENECKS, "strides": (1, 2, 2, 2, 2), "stem_stride": 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rb_repghostnet_050": _BASE | {"width": 0.5},
    "rb_repghostnet_058": _BASE | {"width": 0.58},
    "rb_repghostnet_080": _BASE | {"width": 0.8},
    "rb_repghostnet_100": _BASE | {"width": 1.0},
    "rb_repghostnet_111": _BASE | {"width": 1.11},
    "rb_repghostnet_130": _BASE | {"width": 1.3},
    "rb_repghostnet_150": _BASE | {"width": 1.5},
    "rb_repghostnet_200": _BASE | {"width": 2.0},
}

default_cfgs = configs(ARCHITECTURES, {"first_conv": "stem.conv.branches.0"})

for _name, _architecture in ARCHITECTURES.items():
    register(_name, RepGhostNet, _architecture)
