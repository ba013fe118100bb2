"""UniRepLKNet: few large depthwise kernels with small dilated ones inside, each followed by squeeze-and-excitation.

Source: Ding et al. 2024, "UniRepLKNet: A Universal Perception Large-Kernel ConvNet", https://arxiv.org/abs/2311.15599,
section 3 and table 1.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from repblocks.blocks import BranchConv, RepBlock, resolve_block
from repblocks.blocks.layers import Shift
from repblocks.errors import ConfigurationError
from repblocks.foreign.unireplknet import NAMES
from repblocks.models.layers import SqueezeExcite
from repblocks.models.registry import configs, register
from repblocks.models.staged import Stage, StagedNet, StagePlan, plan_stages

#: Smallest kernel that has small ones inside.
_LARGE = 7


class ResponseNorm(nn.Module):
    """``x * (1 + weight * n)``, where ``n`` is a channel's norm over the map relative to the mean of all channels'.

    Global response normalization without the bias, which folds into the linear layer behind it.

    Args:
        channels: Channels of ``x``.
        eps: Added to the mean of the norms.

    Source: Woo et al. 2023, "ConvNeXt V2", https://arxiv.org/abs/2301.00808, section 3.
    """

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[N, C, H, W]``."""
        norms = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        relative = norms / (norms.mean(1, keepdim=True) + self.eps)
        return x * (1 + self.weight[:, None, None] * relative)


class UniRepLKNetBlock(RepBlock):
    """``x + pointwise2(response(act(pointwise1(se(token_mixer(x))))))``.

    The token mixer is a depthwise convolution and a BatchNorm, ``pointwise2`` a shift (the response norm's), a 1x1
    convolution, a BatchNorm and a layer scale; each is one convolution in deploy form.

    Args:
        channels: Channels of the map.
        kernel_size: Of the token mixer; from 7 on it is a ``block``, below a plain convolution.
        block: Short name in ``BLOCKS`` of the large kernel.
        dilation: Of the token mixer.
        expansion: Width of the hidden layer in ``channels``.
        layer_scale: What the layer scale starts at; 0 for none.
        drop_path: Probability of dropping the residual branch for a sample, in training.

    Raises:
        ConfigurationError: An unknown ``block``.

    Source: Ding et al. 2024, "UniRepLKNet", https://arxiv.org/abs/2311.15599, section 3.1.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        block: str = "dilated",
        dilation: int = 1,
        expansion: int = 4,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = expansion * channels
        mixer = _depthwise(channels, kernel_size, dilation, block)
        self.token_mixer = BranchConv({"kxk": nn.Sequential(mixer, nn.BatchNorm2d(channels))})
        self.se = SqueezeExcite(channels, ratio=1 / 4)
        self.pointwise1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.GELU()
        self.response = ResponseNorm(hidden)
        last = [Shift(hidden), nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        scale = [LayerScale2d(channels, layer_scale)] if layer_scale else []
        self.pointwise2 = BranchConv({"pointwise": nn.Sequential(*last, *scale, DropPath(drop_path))})

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        y = self.se(self.token_mixer(x))
        return x + self.pointwise2(self.response(self.act(self.pointwise1(y))))


def _depthwise(channels: int, kernel_size: int, dilation: int, block: str) -> nn.Module:
    large = resolve_block(block)
    if kernel_size >= _LARGE:
        return large(channels, channels, kernel_size, dilation=dilation, groups=channels)
    reach = dilation * (kernel_size // 2)
    return nn.Conv2d(channels, channels, kernel_size, 1, reach, dilation, groups=channels, bias=False)


class UniRepLKNetStem(nn.Module):
    """``norm2(conv2(act(norm1(conv1(x)))))``: two 3x3 convolutions of stride 2, each with a LayerNorm over channels.

    Not an ``nn.Sequential``, which timm's feature backbones would take apart.

    Args:
        in_channels: Channels of the image.
        channels: Channels of the output, even.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _normed_conv(in_channels, channels // 2, 2)
        self.act = nn.GELU()
        self.conv2, self.norm2 = _normed_conv(channels // 2, channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, channels, H / 4, W / 4]``."""
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))


class UniRepLKNet(StagedNet):
    """A stem of two convolutions, stages of `UniRepLKNetBlock`, a convolution between them, pooling, norm, classifier.

    Args:
        depths: Blocks per stage.
        widths: Channels per stage; the stem has the first one.
        strides: Stride of the convolution before each stage; 1 for none, if the channels stay the same.
        kernel_sizes: Of the blocks, per stage; odd.
        block: Name in ``BLOCKS`` of the linear block that mixes pixels by kernels of 7 and more.
        layer_scale_init_value: What the layer scales start at; 0 for none.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of the image.
        global_pool: timm's pooling name, of a pooling that keeps the number of channels.
        output_stride: 8, 16 or 32; strides beyond it become dilation.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first one.

    Raises:
        ConfigurationError: An unknown ``block``, an ``output_stride`` that is not supported, a pooling that widens the
            map, even kernels, or not one per stage.
    """

    foreign = NAMES

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        kernel_sizes: Sequence[int],
        block: str = "dilated",
        layer_scale_init_value: float = 1e-6,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if len(kernel_sizes) != len(depths) or not all(size % 2 for size in kernel_sizes):
            raise ConfigurationError(f"kernel_sizes={kernel_sizes}: give {len(depths)} odd ones, one per stage")
        plans = plan_stages(
            depths=depths,
            widths=widths,
            strides=strides,
            stem_width=widths[0],
            stem_stride=4,
            output_stride=output_stride,
            drop_path_rate=drop_path_rate,
        )
        make_block = partial(UniRepLKNetBlock, block=block, layer_scale=layer_scale_init_value)
        super().__init__(
            UniRepLKNetStem(in_chans, widths[0]),
            [_stage(plan, size, make_block) for plan, size in zip(plans, kernel_sizes, strict=True)],
            plans=plans,
            stem_stride=4,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            neck=LayerNorm2d(widths[-1], eps=1e-6),
            hidden_features=widths[-1],
        )
        self.stem.apply(_init_weights)
        self.stages.apply(_init_weights)


def _normed_conv(in_channels: int, out_channels: int, stride: int, dilation: int = 1) -> tuple[nn.Conv2d, LayerNorm2d]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation)
    return conv, LayerNorm2d(out_channels, eps=1e-6)


def _stage(plan: StagePlan, kernel_size: int, make_block: partial[UniRepLKNetBlock]) -> Stage:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if plan.taps_input or plan.in_channels != plan.out_channels:
        layers["downsample"] = nn.Sequential(
            *_normed_conv(plan.in_channels, plan.out_channels, plan.stride, plan.first_dilation)
        )
    for i, drop_path in enumerate(plan.drop_paths):
        layers[str(i)] = make_block(plan.out_channels, kernel_size, dilation=plan.dilation, drop_path=drop_path)
    return Stage(layers)


def _init_weights(module: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 and zero biases; fixed filters stay as they are."""
    if isinstance(module, nn.Conv2d) and isinstance(module.weight, nn.Parameter):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_BASE = {"strides": (1, 2, 2, 2), "kernel_sizes": (3, 13, 13, 13)}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rb_unireplknet_a": _BASE | {"depths": (2, 2, 6, 2), "widths": (40, 80, 160, 320)},
    "rb_unireplknet_f": _BASE | {"depths": (2, 2, 6, 2), "widths": (48, 96, 192, 384)},
    "rb_unireplknet_p": _BASE | {"depths": (2, 2, 6, 2), "widths": (64, 128, 256, 512)},
    "rb_unireplknet_n": _BASE | {"depths": (2, 2, 8, 2), "widths": (80, 160, 320, 640)},
}

default_cfgs = configs(ARCHITECTURES, {"first_conv": "stem.conv1"})

for _name, _architecture in ARCHITECTURES.items():
    register(_name, UniRepLKNet, _architecture)
