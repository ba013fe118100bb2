"""Would the model fit into float16? Which layers would not."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: Larger numbers are infinite in float16.
FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Extreme:
    """The largest number of a layer.

    Attributes:
        layer: Name of the module; ``""`` is the whole model.
        kind: Whether it is one of the layer's own weights (or buffers, such as variances), or of its output.
        value: Absolute; infinite or NaN where the layer gives that already.
    """

    layer: str
    kind: Literal["weight", "activation"]
    value: float

    @property
    def overflows(self) -> bool:
        """Whether float16 cannot hold it."""
        return not self.value <= FLOAT16_MAX

    def __str__(self) -> str:
        return f"{self.kind} {self.value:.3g} of {self.layer or 'the model'!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfRange:
    """What float16 would do to a model.

    Attributes:
        overflows: Numbers beyond float16, by layer; activations that overflow inside of a layer are those of the
            innermost one.
        largest: The largest activation and the largest weight.
        samples: Images that ran.
    """

    overflows: tuple[Extreme, ...]
    largest: tuple[Extreme, ...]
    samples: int

    @property
    def fits(self) -> bool:
        """Whether every number fits; only for the images that ran."""
        return not self.overflows

    def to_dict(self) -> dict[str, Any]:
        """The fields, ``fits`` and the limit, for JSON; numbers that are not finite as text."""
        rows = {name: [_row(extreme) for extreme in getattr(self, name)] for name in ("overflows", "largest")}
        return {"fits": self.fits, "limit": FLOAT16_MAX, **rows, "samples": self.samples}

    def __str__(self) -> str:
        if self.fits:
            return f"fits into float16: the largest numbers are {', '.join(map(str, self.largest))}"
        return f"float16 overflows at {FLOAT16_MAX:g}: {', '.join(map(str, self.overflows))}"


def half_range(model: nn.Module, batches: Sequence[Tensor]) -> HalfRange:
    """Find the layers whose weights or outputs float16 cannot hold.

    Args:
        model: In eval mode, in a dtype with a wider range; one in float16 is run in float32.
        batches: Images ``[N, C, H, W]``, as real as possible: what is not seen is not found.
    """
    in_half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    wide = copy.deepcopy(model).float() if in_half else model
    weights = [
        Extreme(layer=name, kind="weight", value=_largest(list(_tensors(_own(module)))))
        for name, module in wide.named_modules()
    ]
    activations = _activations(wide, batches)
    beyond = [extreme for extreme in activations if extreme.overflows]
    innermost = [extreme for extreme in beyond if not any(_is_inside(other, extreme) for other in beyond)]
    return HalfRange(
        overflows=(*(weight for weight in weights if weight.overflows), *innermost),
        largest=tuple(max(kind, key=_badness) for kind in (activations, weights) if kind),
        samples=sum(map(len, batches)),
    )


def _activations(model: nn.Module, batches: Sequence[Tensor]) -> list[Extreme]:
    found: dict[str, float] = {}

    def watch(name: str, module: nn.Module, hooks: ExitStack) -> None:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = max(found.get(name, 0.0), _largest(list(_tensors(output))), key=_beyond)

        hooks.callback(module.register_forward_hook(note).remove)

    with torch.inference_mode(), ExitStack() as hooks:
        for name, module in model.named_modules():
            watch(name, module, hooks)
        for images in batches:
            model(images.float() if images.dtype == torch.float16 else images)
    return [Extreme(layer=name, kind="activation", value=value) for name, value in found.items()]


def _own(module: nn.Module) -> list[Tensor]:
    """What ``half()`` converts of a module itself: a BatchNorm's variance too."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _tensors(output: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _largest(tensors: Sequence[Tensor]) -> float:
    return max((tensor.detach().abs().amax().item() for tensor in tensors if tensor.numel()), default=0.0, key=_beyond)


def _beyond(value: float) -> float:
    """NaN is the worst of all."""
    return math.inf if math.isnan(value) else value


def _badness(extreme: Extreme) -> float:
    return _beyond(extreme.value)


def _is_inside(inner: Extreme, outer: Extreme) -> bool:
    return inner.layer != outer.layer and (not outer.layer or inner.layer.startswith(f"{outer.layer}."))


def _row(extreme: Extreme) -> dict[str, Any]:
    finite = math.isfinite(extreme.value)
    return {**asdict(extreme), "value": extreme.value if finite else str(extreme.value)}
