"""What takes the place of a convolution and its BatchNorm in an expanded model, and remembers what was there."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast, final

from timm.layers import BatchNormAct2d, SyncBatchNormAct  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from repblocks.blocks import RepBlock, RepConv
from repblocks.blocks.base import Children, as_module, folded
from repblocks.blocks.copying import copied
from repblocks.errors import CheckpointError
from repblocks.fusion import AffineConv, fold
from repblocks.fusion.faithful import overridden_methods

Norm = nn.BatchNorm2d | nn.SyncBatchNorm
Module = TypeVar("Module", bound=nn.Module)

_ACTIVATED = (BatchNormAct2d, SyncBatchNormAct)
_NORMS: tuple[type[nn.Module], ...] = (*_ACTIVATED, nn.SyncBatchNorm, nn.BatchNorm2d)
_AFTER = ("drop", "act")  # what timm's activated norms run behind the normalisation, in this order


@final
class ExpandedNorm(nn.Sequential):
    """In the place of a BatchNorm that its `ExpandedConv` took over: what else the module did, under the same names.

    Nothing for torch's BatchNorm; for timm's activated ones ``drop``, then ``act``.
    """


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Original:
    """The layers that were replaced, as descriptions on the meta device, out of reach of parameters and state_dict.

    Attributes:
        conv: The convolution.
        norm: Its BatchNorm, if it had one.
        place: What stands where the norm was.
        batches: What the norm's ``num_batches_tracked`` was.
    """

    conv: nn.Conv2d
    norm: Norm | None
    place: ExpandedNorm | None
    batches: int


@final
class ExpandedConv(RepBlock):
    """A block in the place of a convolution and of the BatchNorm behind it; `contract` gives both back.

    Args:
        block: In train form.
        norm: BatchNorm behind it, where the block has none.
        original: What it stands for.
    """

    block: RepConv
    norm: nn.Module
    conv: nn.Module

    def __init__(self, block: RepConv, norm: Norm | None, original: Original) -> None:
        super().__init__()
        conv = original.conv
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.padding_mode = conv.dilation, conv.padding_mode
        self.original, self.block, self.training = original, block, conv.training
        if norm is not None:
            self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``, normalised where the original was."""
        if self.form == "deploy":
            return self.conv(x)
        for part in self._parts():
            x = part(x)
        return x

    def value(self) -> AffineConv:
        """The one convolution that it is in eval mode, in float64 on the CPU.

        Raises:
            FoldError: It is not exactly one.
        """
        whole = self.conv if self.form == "deploy" else nn.Sequential(*self._parts())
        return folded(whole, self.in_channels).promote(2)

    def deploy_children(self) -> Children:
        """Block and norm as one convolution."""
        return {name: None for name, _ in self.named_children()} | {"conv": as_module(self.value(), like=self)}

    def _parts(self) -> list[nn.Module]:
        return [self.block, self.norm] if hasattr(self, "norm") else [self.block]

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]  # the rest is torch's, passed on
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any
    ) -> None:
        """Recognise the weights of the model before its expansion.

        Raises:
            CheckpointError: The weights are those of the original convolution, or of the other form.
        """
        if f"{prefix}weight" in state_dict:
            raise CheckpointError(
                f"{prefix}weight belongs to the model before its expansion; load these weights into that model, then "
                "call repblocks.expand, or load them into repblocks.contract(model)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _is_other_form(self, given: Sequence[Sequence[str]]) -> bool:
        """Whether the keys are branches for a deploy form, or one convolution for a train form."""
        one_conv = self.form == "train" and ["conv", "weight"] in given
        return one_conv or super()._is_other_form(given)


@fold.register(ExpandedConv, reads=lambda module: module.in_channels)
def _fold_expanded(module: ExpandedConv, in_channels: int | None) -> AffineConv:
    return fold(nn.Sequential(*module.children()), in_channels)


def on_meta(module: Module) -> Module:
    """A copy on the meta device, which costs nothing, whatever the size."""
    return cast(Module, copied(module, lambda tensor: tensor.to("meta")))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm over maps, or timm's kind with an activation behind it, and nothing else."""
    kind = next((cls for cls in _NORMS if isinstance(module, cls)), None)
    return kind is not None and not overridden_methods(module, kind)


def after_norm(norm: Norm) -> ExpandedNorm:
    """What a BatchNorm does behind the normalisation."""
    rest = ExpandedNorm()
    for name in _AFTER if isinstance(norm, _ACTIVATED) else ():
        if hasattr(norm, name):
            rest.add_module(name, norm.get_submodule(name))
    return rest.train(norm.training)


def normalisation_of(norm: Norm) -> Norm:
    """A copy of a BatchNorm without what it does behind the normalisation."""
    if not isinstance(norm, _ACTIVATED):
        return copy.deepcopy(norm)
    sizes = norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    bare = (
        nn.SyncBatchNorm(*sizes, process_group=norm.process_group, device="meta")
        if isinstance(norm, nn.SyncBatchNorm)
        else nn.BatchNorm2d(*sizes, device="meta")
    )
    # Assigned entry by entry: a parameter may be missing, and flags and dtypes are each tensor's own.
    bare._parameters = copy.deepcopy(norm._parameters)  # pyright: ignore[reportPrivateUsage]
    bare._buffers = copy.deepcopy(norm._buffers)  # pyright: ignore[reportPrivateUsage]
    return bare.train(norm.training)
