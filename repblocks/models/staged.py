"""What every network of the zoo shares: a stem, stages that halve the resolution, a pooled linear head.

``StagedNet`` keeps timm's contract for a classifier, so a family only builds its stem and its stages.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from timm.layers import SelectAdaptivePool2d  # pyright: ignore[reportPrivateImportUsage]
from timm.layers._fx import register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repblocks.blocks import RepBlock, form_of, switch_to_deploy
from repblocks.blocks.spec import Identity
from repblocks.errors import ConfigurationError
from repblocks.foreign import Names

OUTPUT_STRIDES = (8, 16, 32)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The geometry of one stage.

    The first layer has ``stride`` and reads the previous stage's grid, so it has that stage's dilation
    (``first_dilation``); the others have ``dilation``. ``drop_paths`` has one rate per layer. ``taps_input`` says that
    the map before this stage is the last one of its resolution in the undilated network, which makes it a feature.
    """

    in_channels: int
    out_channels: int
    stride: int
    first_dilation: int
    dilation: int
    reduction: int
    drop_paths: tuple[float, ...]
    taps_input: bool

    @property
    def identity(self) -> Identity:
        """Whether the first layer may have an identity branch: not where it has taken the place of a strided one."""
        return "never" if self.taps_input else "auto"

    def layers(self) -> Iterator[tuple[int, int, int]]:
        """Channels in, stride and dilation of each layer."""
        yield self.in_channels, self.stride, self.first_dilation
        for _ in self.drop_paths[1:]:
            yield self.out_channels, 1, self.dilation


def plan_stages(
    *,
    depths: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[int],
    stem_width: int,
    stem_stride: int,
    output_stride: int,
    drop_path_rate: float,
) -> list[StagePlan]:
    """Lay out the stages, as timm does.

    Strides beyond ``output_stride`` become dilation. Stochastic depth grows linearly over the layers, from 0 to
    ``drop_path_rate``.

    Raises:
        ConfigurationError: ``output_stride`` is not 8, 16 or 32, or depths, widths and strides differ in number.
    """
    if output_stride not in OUTPUT_STRIDES:
        raise ConfigurationError(f"output_stride={output_stride} is not supported; choose one of {OUTPUT_STRIDES}")
    if not len(depths) == len(widths) == len(strides):
        raise ConfigurationError(
            f"got {len(depths)} depths, {len(widths)} widths and {len(strides)} strides; give one of each per stage"
        )
    last = max(sum(depths) - 1, 1)
    rates = (drop_path_rate * layer / last for layer in range(sum(depths)))
    plans: list[StagePlan] = []
    channels, reduction, dilation = stem_width, stem_stride, 1
    for depth, width, nominal in zip(depths, widths, strides, strict=True):
        stride = 1 if reduction >= output_stride else nominal
        first_dilation, dilation = dilation, dilation * nominal // stride
        reduction *= stride
        plans.append(
            StagePlan(
                in_channels=channels,
                out_channels=width,
                stride=stride,
                first_dilation=first_dilation,
                dilation=dilation,
                reduction=reduction,
                drop_paths=tuple(islice(rates, depth)),
                taps_input=nominal > 1,
            )
        )
        channels = width
    return plans


@contextmanager
def _frozen_statistics(layer: nn.Module) -> Generator[None]:
    """Let BN use the batch's statistics without counting the batch into the running ones."""
    norms = [m for m in layer.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, recomputed in the backward pass; the recomputation leaves the running statistics alone."""
    return checkpoint(layer, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(layer)))


register_notrace_module(RepBlock)  # feature extraction by torch.fx must not look inside blocks


class Stage(nn.Sequential):
    """Layers in a row, each of them checkpointed on demand."""

    grad_checkpointing: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layers in order."""
        for layer in self:
            input = _checkpointed(layer, input) if self.grad_checkpointing else layer(input)
        return input


def linear_classifier(in_features: int, num_classes: int) -> nn.Linear:
    """A linear layer as the papers start it: truncated normal weights of standard deviation 0.02, zero biases."""
    layer = nn.Linear(in_features, num_classes)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


class PooledHead(nn.Module):
    """Global pooling, a neck where there is one, dropout, classifier: ``[N, C, H, W] -> [N, num_classes]``.

    ``num_classes=0`` leaves out the classifier and ``pool_type=""`` the pooling, as in timm.

    Args:
        in_features: C.
        num_classes: Outputs of the classifier; 0 for none.
        pool_type: timm's pooling name.
        drop_rate: Dropout before the classifier.
        neck: Runs on the pooled map ``[N, C, 1, 1]``.
        hidden_features: Channels that the neck gives.
        make_classifier: Makes the classifier from its in and out features.
    """

    global_pool: SelectAdaptivePool2d
    fc: nn.Module

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        pool_type: str,
        drop_rate: float,
        neck: nn.Module | None = None,
        hidden_features: int | None = None,
        make_classifier: Callable[[int, int], nn.Module] = linear_classifier,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.drop_rate = drop_rate
        self.make_classifier = make_classifier
        self.set_pooling(pool_type, neck)
        self.neck = neck
        self.set_classifier(num_classes)

    @property
    def num_features(self) -> int:
        """Width of what the classifier reads."""
        return self.hidden_features or self.in_features * self.global_pool.feat_mult()

    def set_pooling(self, pool_type: str, neck: nn.Module | None) -> None:
        """Put in another pooling, in front of this neck.

        Raises:
            ConfigurationError: The pooling changes the number of channels, and the neck is made for them.
        """
        pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        if neck is not None and pool.feat_mult() != 1:
            raise ConfigurationError(
                f"global_pool={pool_type} widens the map, and this network's neck reads {self.in_features} channels; "
                "use avg, max or avgmax"
            )
        self.global_pool = pool

    def set_classifier(self, num_classes: int) -> None:
        """Put in a new classifier."""
        self.fc = self.make_classifier(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Logits, or the pooled features with ``pre_logits``."""
        x = self.global_pool(x)
        if self.neck is not None:
            x = self.neck(x[..., None, None]).flatten(1) if self.global_pool.pool_type else self.neck(x)
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)


class StagedNet(nn.Module):
    """Base of the zoo's networks: ``head(stages(stem(x)))`` with timm's model contract.

    ``model_args`` are the arguments that build the model again, once the registry has filled them in; ``foreign`` says
    what other repositories call the family's weights.

    Args:
        stem: ``[N, in_chans, H, W] -> [N, C, H / s, W / s]``.
        stages: One module per plan.
        plans: The stages' geometry, from ``plan_stages``.
        stem_stride: Reduction of the stem.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of the image.
        global_pool: timm's pooling name (``avg``, ``max``, ``avgmax``, ``catavgmax``, or empty for none).
        drop_rate: Dropout before the classifier.
        head: Further arguments of `PooledHead`.
    """

    foreign: ClassVar[Mapping[str, Names]] = {}

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        *,
        plans: Sequence[StagePlan],
        stem_stride: int,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
        **head: Any,
    ) -> None:
        super().__init__()
        self.model_args: dict[str, Any] = {}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = plans[-1].out_channels
        self.feature_info = _feature_info(plans, stem_stride)
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.head = PooledHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **head)

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled features before the classifier."""
        return self.head.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map: ``[N, in_chans, H, W] -> [N, num_features, h, w]``."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # noqa: FBT001, FBT002 - timm's signature
        """Logits of a feature map, or its pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (on the network's device, in its dtype and form) and, if given, the pooling.

        Raises:
            ConfigurationError: A pooling that does not fit the network's neck.
        """
        weight, form = next(self.stem.parameters()), form_of(self)
        if global_pool is not None:
            self.head.set_pooling(global_pool, self.head.neck)
        self.num_classes = num_classes
        self.head.set_classifier(num_classes)
        if form == "deploy":
            switch_to_deploy(self.head.fc.eval())
        self.model_args = {
            **self.model_args,
            "num_classes": num_classes,
            "global_pool": self.head.global_pool.pool_type,
        }
        self.head.train(self.training).to(device=weight.device, dtype=weight.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:  # noqa: FBT001, FBT002 - timm's signature
        """Recompute each block in the backward pass instead of keeping what is inside it."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002 - timm's signature
        """Patterns that order the parameters from stem to head, by block or (``coarse``) by stage."""
        by_block = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else by_block}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last feature map and the chosen entries of ``feature_info``.

        Args:
            x: Images.
            indices: Entries to give: the last n, a list, or None for all.
            norm: Without effect; there is no norm after the last stage.
            stop_early: Do not run the stages after the last chosen one.
            output_fmt: Only ``NCHW``.
            intermediates_only: Give the list alone.

        Raises:
            ConfigurationError: Another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ConfigurationError(f"output_fmt={output_fmt!r}: these networks give NCHW maps only")
        chosen, last = feature_take_indices(len(self.feature_info), indices)
        maps = [x := self.stem(x)]
        maps += [x := stage(x) for stage in self.stages[: self._stages_until(last) if stop_early else None]]
        taken = [maps[self.feature_info[i]["stage"]] for i in sorted(chosen)]
        return taken if intermediates_only else (x, taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, *, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what ``forward_intermediates(x, indices)`` does not need; gives the indices as a list."""
        chosen, last = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[: self._stages_until(last)]
        self.num_features = self.head.in_features = self.feature_info[last]["num_chs"]
        if prune_head or last < len(self.feature_info) - 1:
            self.head.neck = self.head.hidden_features = None
            self.reset_classifier(0, "")
        return chosen

    def _stages_until(self, feature: int) -> int:
        return self.feature_info[feature]["stage"]


def _feature_info(plans: Sequence[StagePlan], stem_stride: int) -> list[dict[str, Any]]:
    """One entry per resolution of the undilated network; ``stage`` 0 is the stem."""
    reductions = [stem_stride] + [plan.reduction for plan in plans]
    info: list[dict[str, Any]] = []
    for index, plan in enumerate(plans):
        if plan.taps_input:
            info.append(_feature(plan.in_channels, reductions[index], index))
    return [*info, _feature(plans[-1].out_channels, reductions[-1], len(plans))]


def _feature(channels: int, reduction: int, stage: int) -> dict[str, Any]:
    module = f"stages.{stage - 1}" if stage else "stem"
    return {"num_chs": channels, "reduction": reduction, "module": module, "stage": stage}
