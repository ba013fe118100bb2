"""`fold`: a module becomes the one convolution that it computes."""

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # base of every BatchNorm
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]  # base of every dropout

from repblocks.errors import FoldError
from repblocks.fusion import constructors
from repblocks.fusion.affine_conv import AffineConv, ConvNd
from repblocks.fusion.constructors import AdaptiveAvgPoolNd, AvgPoolNd
from repblocks.fusion.containers import Concat, SplitConcat, Sum
from repblocks.fusion.faithful import has_forward_hooks, overridden_methods
from repblocks.fusion.structure import meta_structure
from repblocks.fusion.transposed import AffineConvTranspose, AnyConv, ConvTransposeNd
from repblocks.fusion.verbs import add, compose, concat, split_concat

Rule = Callable[..., AnyConv]
ChannelsRead = Callable[[Any], int | None]
SomeRule = TypeVar("SomeRule", bound=Rule)


class Fold:
    """``fold(module, in_channels=None) -> AffineConv``: the value of a linear module, ``fold(m)(x) == m(x)``.

    The module is taken as it behaves now: eval-mode BatchNorm folds by its running statistics, and what is random
    or depends on the batch raises. The value refers to the live parameters, so gradients reach them. ``nn.Sequential``
    composes, ``Sum`` adds, ``Concat`` and ``SplitConcat`` concatenate. A linear layer reads ``[N, in_features]``. What
    holds a transposed convolution folds to an `AffineConvTranspose`.

    No number is looked at, so that folding stays differentiable and compilable: NaN and infinite weights give NaN and
    infinite weights. Deployment (``switch_to_deploy``, ``deployed``) refuses those.

    A class's rule holds for its subclasses only as far as they keep its ``forward``.

    Args:
        module: Any module with a rule; ``fold.register`` adds one.
        in_channels: Channels of the input, where the module cannot tell (``nn.Identity``, pooling).

    Raises:
        FoldError: The module has no rule, overrides the forward of the class that has one, carries forward hooks, is
            in training mode where that matters, or is not one convolution.

    Source: Ding et al. 2021, "RepVGG", https://arxiv.org/abs/2101.03697, section 3.3.
    """

    most_meta_values = 1000
    """How many values on the meta device are remembered; they hold no numbers."""

    def __init__(self) -> None:
        self._rules: dict[type[nn.Module], tuple[Rule, ChannelsRead]] = {}
        self._on_meta: dict[Hashable, AnyConv] = {}

    def register(
        self, *classes: type[nn.Module], reads: ChannelsRead = lambda module: None
    ) -> Callable[[SomeRule], SomeRule]:
        """Decorate ``rule(module, in_channels) -> AffineConv`` as the rule for these classes.

        ``reads(module)`` gives the channels of the input where the module knows them, for siblings that do not.
        """

        def remember(rule: SomeRule) -> SomeRule:
            self._rules.update(dict.fromkeys(classes, (rule, reads)))
            self._on_meta.clear()
            return rule

        return remember

    def applies_to(self, module: nn.Module) -> bool:
        """Whether a rule holds for a module, hooks aside: its class has one, and its forward is that class's."""
        cls = self._ruled_class(module)
        return cls is not None and not overridden_methods(module, cls)

    def channels_read(self, module: nn.Module) -> int | None:
        """Channels of a module's input, as far as it knows them."""
        cls = self._ruled_class(module)
        return None if cls is None else self._rules[cls][1](module)

    def _ruled_class(self, module: nn.Module) -> type[nn.Module] | None:
        return next((cls for cls in type(module).__mro__ if cls in self._rules), None)

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]  # chains of transposed ones are beyond static types
        self, module: ConvTransposeNd, in_channels: int | None = None
    ) -> AffineConvTranspose: ...
    @overload
    def __call__(self, module: nn.Module, in_channels: int | None = None) -> AffineConv: ...
    def __call__(self, module: nn.Module, in_channels: int | None = None) -> AnyConv:
        """Fold ``module``; see the class."""
        structure = meta_structure(module)
        if structure is None:
            value = self.constant(module, in_channels)
            return value if _tensor_of(module) is not None else value.to(dtype=torch.get_default_dtype())
        return self._without_numbers(module, in_channels, (structure, in_channels))

    def _without_numbers(self, module: nn.Module, in_channels: int | None, key: Hashable) -> AnyConv:
        """The value of a module on the meta device: equal structures, which models have many of, share one."""
        if key not in self._on_meta:
            if len(self._on_meta) == self.most_meta_values:
                self._on_meta.clear()
            with torch.no_grad():
                self._on_meta[key] = self.constant(module, in_channels)
        return self._on_meta[key]

    def constant(self, module: nn.Module, in_channels: int | None) -> AnyConv:
        """Fold, leaving what has no tensors of its own (pooling, identity) in float64, to be cast to its siblings'."""
        cls = self._ruled_class(module)
        if cls is None:
            raise FoldError(
                f"no rule folds {type(module).__name__}; if it is linear, give it one: @repblocks.fold.register(...)"
            )
        _require_faithful(module, cls)
        return self._rules[cls][0](module, in_channels)


fold = Fold()


def _require_faithful(module: nn.Module, cls: type[nn.Module]) -> None:
    overridden = overridden_methods(module, cls)
    if overridden:
        raise FoldError(
            f"{type(module).__name__} overrides {', '.join(overridden)} of {cls.__name__}, so it may compute something "
            f"else; register its own rule: @repblocks.fold.register({type(module).__name__})"
        )
    if has_forward_hooks(module):
        raise FoldError(f"{type(module).__name__} carries forward hooks, which folding would lose; remove them first")


def fold_siblings(modules: Iterable[nn.Module], in_channels: int | None) -> list[AnyConv]:
    """Fold modules over one input, constants in the dtype and on the device of the others."""
    members = list(modules)
    known = in_channels if in_channels is not None else _first_known(members)
    return _like_each_other(members, [fold.constant(module, known) for module in members])


def _like_each_other(modules: Sequence[nn.Module], values: Sequence[AnyConv]) -> list[AnyConv]:
    tensors = [_tensor_of(module) for module in modules]
    model = next((tensor for tensor in tensors if tensor is not None), None)
    if model is None:
        return list(values)
    return [
        value.to(model.device, model.dtype) if tensor is None else value
        for value, tensor in zip(values, tensors, strict=True)
    ]


def _tensor_of(module: nn.Module) -> Tensor | None:
    return next(
        (t for t in chain(module.parameters(), module.buffers()) if t.is_floating_point() or t.is_complex()), None
    )


def _first_known(modules: Iterable[nn.Module]) -> int | None:
    return next((channels for channels in map(fold.channels_read, modules) if channels is not None), None)


def known_channels(module: nn.Module, in_channels: int | None) -> int:
    """The channels of a module's input, which the module itself does not tell.

    Raises:
        FoldError: Nobody tells them.
    """
    if in_channels is None:
        raise FoldError(f"{module!r} does not tell its channels; call fold(module, in_channels=...)")
    return in_channels


@fold.register(nn.Conv1d, nn.Conv2d, nn.Conv3d, reads=lambda conv: conv.in_channels)
def _fold_conv(module: ConvNd, in_channels: int | None) -> AffineConv:
    return AffineConv.from_module(module)


@fold.register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, reads=lambda norm: norm.num_features)
def _fold_batch_norm(module: _BatchNorm, in_channels: int | None) -> AffineConv:
    if module.training and module.running_mean is not None:
        raise FoldError(f"{module!r} is in training mode and normalises by each batch; call eval() first")
    return constructors.from_batch_norm(module)


@fold.register(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _fold_pool(module: AvgPoolNd, in_channels: int | None) -> AffineConv:
    return constructors.from_pool(module, known_channels(module, in_channels), dtype=torch.float64)


@fold.register(nn.Identity)
def _fold_identity(module: nn.Module, in_channels: int | None) -> AffineConv:
    return constructors.identity(known_channels(module, in_channels), dtype=torch.float64)


@fold.register(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
def _fold_dropout(module: _DropoutNd, in_channels: int | None) -> AffineConv:
    if module.training and module.p > 0:
        raise FoldError(f"{module!r} is in training mode and drops at random; call eval() first")
    return _fold_identity(module, in_channels)


@fold.register(nn.Linear, reads=lambda fc: fc.in_features)
def _fold_linear(module: nn.Linear, in_channels: int | None) -> AffineConv:
    return constructors.from_linear(module)


@fold.register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, reads=lambda conv: conv.in_channels)
def _fold_conv_transpose(module: ConvTransposeNd, in_channels: int | None) -> AffineConvTranspose:
    return AffineConvTranspose.from_module(module)


@fold.register(nn.Flatten)
def _refuse_flatten(module: nn.Flatten, in_channels: int | None) -> AffineConv:
    raise FoldError(
        f"the kernel of a linear layer behind {module!r} depends on the size of the map; fold what is before it, and "
        "the linear layer by repblocks.fusion.from_flattened_linear(fc, input_size)"
    )


@fold.register(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _refuse_adaptive_pool(module: AdaptiveAvgPoolNd, in_channels: int | None) -> AffineConv:
    raise FoldError(
        f"the windows of {module!r} depend on the size of the map; call "
        "repblocks.fusion.from_adaptive_pool(pool, channels, input_size), and compose it with what follows"
    )


@fold.register(nn.Sequential, reads=lambda chain: _first_known(chain))
def _fold_sequential(module: nn.Sequential, in_channels: int | None) -> AnyConv:
    members = list(module)
    channels = in_channels if in_channels is not None else _first_known(members)
    if not members:
        return _fold_identity(module, channels)
    links: list[AnyConv] = []
    for member in members:
        links.append(fold.constant(member, channels))
        channels = links[-1].out_channels
    return _outside_linear(module, functools.reduce(compose, _like_each_other(members, links)))


@fold.register(Sum, reads=lambda branches: _first_known(branches.values()))
def _fold_sum(module: Sum, in_channels: int | None) -> AnyConv:
    return _outside_linear(module, add(*fold_siblings(module.values(), in_channels)))


@fold.register(Concat, reads=lambda branches: _first_known(branches.values()))
def _fold_concat(module: Concat, in_channels: int | None) -> AnyConv:
    return _outside_linear(module, concat(*fold_siblings(module.values(), in_channels)))


@fold.register(SplitConcat, reads=lambda branches: sum(branches.widths))
def _fold_split_concat(module: SplitConcat, in_channels: int | None) -> AnyConv:
    members = list(module.values())
    values = [fold.constant(member, width) for member, width in zip(members, module.widths, strict=True)]
    return _outside_linear(module, split_concat(*_like_each_other(members, values)))


def _outside_linear(module: nn.Module, value: AnyConv) -> AnyConv:
    """Refuse linear layers among convolutions: they act on the last dimension, not on the channels."""
    members = list(module.modules())
    spatial = value.rank or any(isinstance(member, nn.BatchNorm2d | nn.BatchNorm3d) for member in members)
    if spatial and any(isinstance(member, nn.Linear) for member in members):
        raise FoldError(
            "nn.Linear beside convolutions acts on the last dimension of the map, not on the channels; "
            "use a 1x1 convolution, or fold the linear part alone"
        )
    return value
