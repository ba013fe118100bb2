"""One training step of a block in two executions, compared; and the geometries to compare them over.

How close is close: ``max|a - b|`` at most 1e-10 of the largest number of its kind, the bound of the design. Gradients
of BatchNorm cancel: a weight only scaled by a branch that is normalised behind it has a gradient near zero, the
difference of two terms as large as ``|s_i G|``, and so has every gradient of a batch of two values, and every bias in
front of a norm. What rounding leaves is relative to the terms and not to their difference, so a gradient's scale is the
larger of itself and of the gradient without those terms, that of constant statistics. What is smaller than a
thousandth, where everything drawn is about one, is a zero.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from blocks.claims import BUILDERS
from support import randomise_batch_norms
from torch import Tensor, nn

import repblocks as rb

EXACT = 1e-10
ZERO = 1e-3
METHODS = ("patches", "outputs")

Left = dict[str, Tensor]


def training(block: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and training mode, with statistics and affine parameters that are not those of initialisation."""
    return randomise_batch_norms(block.double(), torch.Generator().manual_seed(seed)).train()


def image(*shape: int, seed: int = 1, channels_last: bool = False) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    # A mean per channel, as behind an activation: zero would hide a forgotten one.
    x = x + torch.linspace(-1, 2, shape[1], dtype=torch.float64)[:, None, None]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=layout).requires_grad_()


def cotangent(y: Tensor) -> Tensor:
    draw = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return draw.to(y.dtype)


def in_execution(block: nn.Module, execution: str) -> nn.Module:
    """A copy that runs so; the modes of its parts stay."""
    twin = copy.deepcopy(block)
    rb.set_execution(twin, execution)
    return twin


def step(block: nn.Module, x: Tensor) -> Left:
    """Everything that one forward and backward pass leaves: output, gradients and buffers. The block is changed."""
    leaf = x.detach().requires_grad_(x.requires_grad)
    torch.manual_seed(3)
    y = block(leaf)
    if y.requires_grad:
        y.backward(cotangent(y))
    return {"output": y.detach()} | left_by(block, leaf)


def left_by(block: nn.Module, leaf: Tensor) -> Left:
    gradients = {"input": leaf.grad} | {name: p.grad for name, p in block.named_parameters()}
    found = {f"gradient of {name}": g.clone() for name, g in gradients.items() if g is not None}
    return found | {f"buffer {name}": b.clone() for name, b in block.named_buffers()}


def stepped(block: nn.Module, x: Tensor, execution: str) -> Left:
    """As `step`, on a copy in this execution."""
    return step(in_execution(block, execution), x)


def scales(block: nn.Module, x: Tensor, expected: Left) -> dict[str, float]:
    """The size of the terms that each number of a step is a sum of: see the module."""
    with constant_statistics():
        terms = stepped(block, x, "separate")
    found = {name: max(largest(tensor), ZERO) for name, tensor in expected.items()}
    for name in (name for name in expected if name.startswith("gradient")):
        found[name] = max(found[name], largest(terms[name]))
    return found


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


@contextmanager
def constant_statistics():
    """BatchNorm whose statistics of the batch count as constants in backward."""

    def batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps):
        if not training:
            return plain(x, running_mean, running_var, weight, bias, training, momentum, eps)
        variance, mean = torch.var_mean(x.detach(), dim=(0, 2, 3), correction=0)
        return plain_affine(x, mean, variance, weight, bias, eps)

    plain = F.batch_norm
    with mock.patch.object(F, "batch_norm", batch_norm):
        yield


def plain_affine(x, mean, variance, weight, bias, eps):
    y = (x - mean[:, None, None]) * torch.rsqrt(variance + eps)[:, None, None]
    y = y if weight is None else y * weight[:, None, None]
    return y if bias is None else y + bias[:, None, None]


def differences(got: Left, expected: Left, scale: Mapping[str, float], tolerance: float = EXACT) -> dict[str, str]:
    """What is not the same, and by how much."""
    assert list(got) == list(expected)
    errors = {name: largest(got[name].double() - expected[name].double()) for name in expected}
    return {
        name: f"off by {error:.2g}, at most {tolerance:.1g} of {scale[name]:.2g}"
        for name, error in errors.items()
        if not error <= tolerance * scale[name]
    }


def assert_same_step(block: nn.Module, x: Tensor, *executions: str) -> None:
    """A step in these executions leaves what separate branches leave."""
    expected = stepped(block, x, "separate")
    scale = scales(block, x, expected)
    wrong = {how: differences(stepped(block, x, how), expected, scale) for how in executions or METHODS}
    assert not any(wrong.values()), wrong


def method_of(block: nn.Module, x: Tensor, execution: str) -> str:
    """What runs: the method of the plan's first block."""
    rows = rb.execution_plan(in_execution(block, execution), tuple(x.shape[1:]), batch_size=len(x)).blocks
    return rows[0].method


def saved_bytes(block: nn.Module, x: Tensor) -> int:
    """What a forward pass keeps for backward, in storages counted once, beyond parameters and buffers."""
    seen = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x).sum()
    return sum(sizes.values())


@dataclass(frozen=True)
class Geometry:
    """Of a block and its input.

    Attributes:
        shape: Channels read and written, kernel size.
        options: `nn.Conv2d`'s further arguments.
        size: Height and width of the input.
    """

    shape: tuple[int, int, Any]
    size: tuple[int, int] = (7, 10)
    batch: int = 3
    channels_last: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def image(self) -> Tensor:
        return image(self.batch, self.shape[0], *self.size, channels_last=self.channels_last)

    def arguments(self) -> dict[str, Any]:
        return {"groups": 1, **self.options}


def over(*shape: Any, size=(7, 10), batch=3, channels_last=False, **options: Any) -> Geometry:
    return Geometry(shape, size, batch, channels_last, options)


DENSE = {
    "dense": over(4, 6, 3),
    "dense_with_identity": over(6, 6, 3, size=(8, 5), batch=2),
    "dense_channels_last": over(6, 6, 3, channels_last=True),
    "dense_stride_2": over(6, 6, 3, stride=2, size=(9, 12)),
    "dense_stride_2_of_an_even_map": over(4, 4, 3, stride=2, size=(8, 6), batch=1),
    "dense_stride_2_by_1": over(4, 6, 3, stride=(2, 1)),
    "stem": over(3, 8, 3, stride=2, size=(11, 14), channels_last=True),
    "stem_of_one_channel": over(1, 8, 3, stride=2, size=(10, 9)),
    "dense_kernel_2": over(4, 4, 2),
    "dense_kernel_3_by_1": over(6, 6, (3, 1)),
    "dense_kernel_4_stride_2": over(4, 6, 4, stride=2),
    "dense_kernel_5_dilated": over(4, 4, 5, dilation=2, size=(11, 12)),
    "dense_unpadded": over(4, 6, 3, padding=0),
    "dense_padded_wide": over(4, 4, 3, padding=3, size=(5, 6)),
    "dense_padded_per_side": over(4, 6, 3, padding=((2, 0), (0, 1)), size=(6, 7)),
    "dense_reflect": over(4, 4, 3, padding_mode="reflect"),
    "dense_circular_stride_2": over(4, 6, 3, padding_mode="circular", stride=2),
    "dense_batch_1": over(4, 4, 3, batch=1, size=(2, 3)),
    "dense_map_below_the_kernel": over(4, 6, 7, size=(2, 3)),
    "grouped": over(6, 6, 3, groups=2),
    "grouped_widening_stride_2": over(4, 8, 3, groups=2, stride=2, channels_last=True),
    "grouped_kernel_4_by_1": over(4, 4, (4, 1), groups=2, padding=((1, 2), (3, 0))),
}
POINTWISE = {
    "pointwise": over(4, 6, 1),
    "pointwise_with_identity": over(6, 6, 1, channels_last=True),
    "pointwise_stride_2": over(6, 6, 1, stride=2, size=(9, 7)),
    "pointwise_grouped": over(6, 4, 1, groups=2, batch=1),
    "pointwise_padded": over(4, 4, 1, padding=1, size=(3, 4)),
    "pointwise_padded_reflect": over(4, 4, 1, padding=1, padding_mode="reflect", size=(3, 4)),
    "pointwise_depthwise": over(5, 5, 1, groups=5),
    "pointwise_of_more_channels_than_pixels": over(12, 9, 1, size=(1, 2), batch=2),
    "pointwise_narrow_map": over(4, 4, 1, size=(1, 9), batch=1),
}
DEPTHWISE = {
    "depthwise": over(6, 6, 3, groups=6),
    "depthwise_channels_last": over(6, 6, 3, groups=6, channels_last=True, size=(9, 6)),
    "depthwise_stride_2": over(6, 6, 3, groups=6, stride=2, size=(9, 12)),
    "depthwise_stride_2_channels_last": over(6, 6, 3, groups=6, stride=2, size=(8, 7), channels_last=True),
    "depthwise_stride_2_by_1": over(4, 4, 3, groups=4, stride=(2, 1)),
    "depthwise_stride_3": over(4, 4, 3, groups=4, stride=3, size=(10, 11)),
    "depthwise_multiplied": over(3, 6, 3, groups=3),
    "depthwise_kernel_2": over(4, 4, 2, groups=4),
    "depthwise_kernel_1_by_3": over(4, 4, (1, 3), groups=4),
    "depthwise_kernel_4": over(4, 4, 4, groups=4, channels_last=True),
    "depthwise_kernel_5": over(4, 4, 5, groups=4, size=(6, 9)),
    "depthwise_kernel_5_stride_2": over(4, 4, 5, groups=4, stride=2, size=(9, 8)),
    "depthwise_kernel_7": over(5, 5, 7, groups=5, size=(9, 8)),
    "depthwise_kernel_7_by_2": over(4, 4, (7, 2), groups=4, stride=(1, 2)),
    "depthwise_dilated": over(4, 4, 3, groups=4, dilation=2),
    "depthwise_dilated_stride_2": over(4, 4, 3, groups=4, dilation=(1, 2), stride=2, size=(8, 9)),
    "depthwise_unpadded": over(4, 4, 3, groups=4, padding=0),
    "depthwise_padded_wide": over(4, 4, 3, groups=4, padding=4, size=(3, 5)),
    "depthwise_padded_per_side": over(4, 4, 3, groups=4, padding=((0, 2), (3, 1))),
    "depthwise_reflect": over(4, 4, 5, groups=4, padding_mode="reflect"),
    "depthwise_circular": over(4, 4, 3, groups=4, padding_mode="circular", channels_last=True),
    "depthwise_map_below_the_kernel": over(4, 4, 7, groups=4, size=(2, 3)),
    "depthwise_row_of_pixels": over(4, 4, 3, groups=4, size=(1, 8)),
    "depthwise_column_of_pixels_batch_1": over(4, 4, 5, groups=4, size=(6, 1), batch=1),
    "depthwise_two_values": over(4, 4, (1, 3), groups=4, size=(2, 1), batch=1),
    "depthwise_of_two_rows": over(4, 4, 3, groups=4, size=(2, 5)),
    "depthwise_of_four_pixels": over(4, 4, 3, groups=4, size=(2, 2), channels_last=True),
    "depthwise_of_nine_pixels": over(4, 4, 3, groups=4, size=(3, 3), batch=1),
    "depthwise_larger": over(4, 4, 3, groups=4, size=(16, 13), channels_last=True),
    "depthwise_single_pixel": over(4, 4, 3, groups=4, size=(1, 1), batch=3),
}
GEOMETRIES = {**DENSE, **POINTWISE, **DEPTHWISE}


def made(make: Callable[..., nn.Module], geometry: Geometry, *, seed: int = 0) -> nn.Module:
    """A block of this geometry, ready to be trained."""
    torch.manual_seed(seed)
    return training(make(*geometry.shape, **geometry.arguments()), seed)


class SmallNet(nn.Module):
    """A stem, a depthwise and a pointwise block, with what stands between them."""

    def __init__(self):
        super().__init__()
        self.stem = rb.RepVGGConv(3, 8, 3, stride=2)
        self.depthwise = rb.MobileOneConv(8, 8, 3, groups=8)
        self.pointwise = rb.MobileOneConv(8, 12, 1, num_conv_branches=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu_(self.depthwise(x))
        return self.head(torch.relu(self.pointwise(x)).mean((2, 3)))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return training(SmallNet())


USUAL = over(6, 6, 3, groups=6, size=(6, 7))


def block_and_image(name: str = "mobileone", place: Geometry = USUAL) -> tuple[nn.Module, Tensor]:
    return made(BUILDERS[name], place), place.image()


def row_of(block: nn.Module, x: Tensor):
    """The plan's only row."""
    (row,) = rb.execution_plan(block, tuple(x.shape[1:]), batch_size=len(x)).blocks
    return row


SMALL = {
    "dense": over(2, 3, 3, size=(4, 5), batch=2),
    "pointwise": over(3, 3, 1, size=(3, 4), batch=2),
    "depthwise": over(2, 2, 3, size=(4, 5), batch=2, groups=2),
    "depthwise_stride_2": over(2, 2, 3, size=(5, 6), batch=2, groups=2, stride=2),
}


def small_block(place, method, name="mobileone"):
    return in_execution(made(BUILDERS[name], SMALL[place]), method), SMALL[place].image()
