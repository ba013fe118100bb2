"""RepNeXt: a block whose shortcut collapses too."""

from collections.abc import Callable
from typing import Literal, Unpack

from timm.layers import DropPath  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from repblocks.blocks.base import Children, RepBlock, as_module, folded, require_collapsible
from repblocks.blocks.registry import resolve_block
from repblocks.blocks.spec import Geometry
from repblocks.errors import ConfigurationError
from repblocks.fusion import AffineConv, absorb_shortcut
from repblocks.fusion.geometry import Pair
from repblocks.names import known_name


class RepNeXtBlock(RepBlock):
    """``act(x) + drop_path(pointwise2(act(pointwise1(token_mixer(x)))))``.

    In deploy form "absorb" carries x through the chain on dirac-expanded channels, so that no shortcut is left: C -> 2C
    depthwise, 2C -> (expansion + 1) C, activation, (expansion + 1) C -> C. That costs more pointwise MACs than "keep",
    which collapses the token mixer only. Both are exact.

    Args:
        channels: C.
        block: Short name of the depthwise token mixer in ``BLOCKS``.
        expansion: Width of the hidden layer in C.
        drop_path: Probability of dropping the branch for a sample, in training.
        act_layer: Makes the activation, the same for every element.
        shortcut: "absorb" or "keep".
        pointwise: Whether 1x1 "conv" or "linear" layers run the two pointwise maps; they differ in speed only.
        kernel_size, geometry: Of the token mixer.

    Raises:
        ConfigurationError: An unknown choice, or ``groups`` other than C.
        FoldError: ``shortcut="absorb"`` with an activation that differs between channels, or a token mixer that
            changes the grid.

    Source: seed of the project, "Shortcut re-parameterization", 6b.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Pair = 7,
        *,
        block: str = "repunit",
        expansion: int = 4,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        shortcut: Literal["absorb", "keep"] = "absorb",
        pointwise: Literal["conv", "linear"] = "conv",
        **geometry: Unpack[Geometry],
    ) -> None:
        super().__init__()
        self.shortcut = known_name("shortcut", shortcut, ("absorb", "keep"))
        self.pointwise = known_name("pointwise", pointwise, ("conv", "linear"))
        groups = geometry.setdefault("groups", channels)
        if groups != channels:
            raise ConfigurationError(f"groups={groups}: the token mixer is depthwise; leave groups out")
        self.token_mixer: nn.Module = resolve_block(block)(channels, channels, kernel_size, **geometry)
        self.pointwise1 = _pointwise(pointwise, channels, expansion * channels)
        self.act = act_layer()
        self.pointwise2 = _pointwise(pointwise, expansion * channels, channels)
        self.drop_path = DropPath(drop_path)
        require_collapsible(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        y = self._mix_channels(self.token_mixer(x))
        if self.form == "train":
            return self.act(x) + self.drop_path(y)
        return y if self.shortcut == "absorb" else self.act(x) + y

    def _mix_channels(self, x: Tensor) -> Tensor:
        if self.pointwise == "conv":
            return self.pointwise2(self.act(self.pointwise1(x)))
        return self.pointwise2(self.act(self.pointwise1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)

    def deploy_children(self) -> Children:
        """The chain, without a shortcut where that is absorbed, and without drop path."""
        chain = {name: folded(self.get_submodule(name)) for name in ("token_mixer", "pointwise1", "pointwise2")}
        if self.shortcut == "keep":
            return {"token_mixer": as_module(chain["token_mixer"], like=self), "drop_path": None}
        merged = absorb_shortcut(tuple(chain.values()), (nn.Identity(), self.act))
        modules = [as_module(_in_its_layout(*link), like=self) for link in zip(merged, chain.values(), strict=True)]
        return dict(zip(chain, modules, strict=True), drop_path=None)


def _pointwise(kind: Literal["conv", "linear"], in_channels: int, out_channels: int) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, 1) if kind == "conv" else nn.Linear(in_channels, out_channels)


def _in_its_layout(value: AffineConv, before: AffineConv) -> AffineConv:
    """A linear layer stays one: absorbing promoted it to a pointwise convolution."""
    return value.flatten() if before.rank == 0 else value
