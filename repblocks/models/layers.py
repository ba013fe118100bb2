"""What several families share: a stem, squeeze-and-excitation, stochastic depth of branches."""

from collections.abc import Iterable

from timm.layers import DropPath  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from repblocks.blocks import ConvBN, RepBlock
from repblocks.errors import ConfigurationError
from repblocks.fusion import Sum


class PatchStem(RepBlock):
    """``BN(3x3(gelu(BN(3x3(x)))))``, each of stride 2, with half of the channels in between.

    Args:
        in_channels: Of the image.
        out_channels: Of the result, even.

    Source: Wang et al. 2024, "RepViT", https://arxiv.org/abs/2307.09283, section 3.3.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(in_channels, out_channels // 2, 3, stride=2)
        self.act = nn.GELU()
        self.conv2 = ConvBN(out_channels // 2, out_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H / 4, W / 4]``."""
        return self.conv2(self.act(self.conv1(x)))


class SqueezeExcite(nn.Module):
    """Weigh the channels by a gate of their means: ``x * sigmoid(fc2(relu(fc1(mean(x)))))``.

    Args:
        channels: Channels of ``x``.
        ratio: Width between the two layers relative to ``channels``.

    Source: Hu et al. 2018, "Squeeze-and-Excitation Networks", https://arxiv.org/abs/1709.01507.
    """

    def __init__(self, channels: int, *, ratio: float) -> None:
        super().__init__()
        hidden = max(1, int(channels * ratio + 0.5))
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``[N, C, H, W]`` channel by channel."""
        hidden = self.fc1(x.mean((2, 3), keepdim=True)).relu()
        return x * self.fc2(hidden).sigmoid()


def drop_beside_identity(blocks: Iterable[nn.Module], rates: Iterable[float]) -> None:
    """Drop convolution branches at random, in the blocks where an identity branch remains."""
    sums = [(block.get_submodule("conv.branches"), rate) for block, rate in zip(blocks, rates, strict=True)]
    shielded = [(list(branches.children()), rate) for branches, rate in sums if _has_identity(branches)]
    if not shielded:
        raise ConfigurationError(
            "no block has an identity branch beside which its convolutions could be dropped; "
            "use drop_path_rate=0, or a block that has one, such as block='repvgg'"
        )
    for branches, rate in shielded:
        for branch in branches:
            if isinstance(branch, nn.Sequential):
                branch.append(DropPath(rate))


def _has_identity(branches: nn.Module) -> bool:
    return isinstance(branches, Sum) and any(isinstance(branch, nn.BatchNorm2d) for branch in branches.children())
