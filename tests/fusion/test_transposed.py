"""Transposed convolutions as values: from modules and back, refused where they do not fit."""

import pytest
import torch
from fusion.laws import assert_same
from fusion.modules import prepared
from fusion.transposed_cases import assert_value_is, conv_norm_up, convs_with_input, run, transposed_modules, up
from hypothesis import given
from strategies import randn, seeds
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from repblocks.blocks import BranchConv
from repblocks.errors import FoldError
from repblocks.fusion import AffineConvTranspose, Concat, SplitConcat, Sum, absorb_shortcut, fold, to_linear
from repblocks.fusion.matrix import to_matrix


@given(convs_with_input())
def test_a_transposed_value_computes_what_torch_computes_with_its_tensors_and_geometry(case):
    conv, x = case
    assert_value_is(conv, x, run(conv, x))


@given(transposed_modules(), seeds)
def test_a_transposed_module_becomes_a_value_and_comes_back_as_it_was(module, seed):
    value = fold(module)
    x = randn(seed, 2, module.in_channels, *(5, 6, 7)[: value.rank])
    assert value.weight is module.weight
    with torch.no_grad():
        assert_same(module(x), value(x))
    again = value.to_module()
    for name in ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups"):
        assert getattr(again, name) == getattr(module, name)
    assert torch.equal(again.weight, module.weight)


def test_a_dilated_kernel_grown_for_torch_stays_dilated():
    conv = up(2, 2, 3, dilation=(3,), padding=((0, 4),))
    x = randn(1, 2, 2, 6)
    assert conv.to_module().dilation == (3,)
    assert_value_is(conv, x, run(conv, x))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: up(2), r"needed \[I, O / groups, \*kernel_size\]"),
        (lambda: up(2, 3), r"needed \[I, O / groups, \*kernel_size\]"),
        (lambda: up(3, 2, 3, groups=2), "must be positive and divide the 3 in channels"),
        (lambda: up(2, 2, 3, groups=-2), "must be positive and divide the 2 in channels"),
        (lambda: up(2, 2, 3, bias=torch.ones(2)), "needed .* of the weight's torch.float64"),
        (lambda: up(2, 2, 3, bias=randn(1, 3)), r"got a bias \(3,\) .*needed \(2,\)"),
        (lambda: up(2, 2, 3, stride=2), r"got stride=2; needed a tuple of 1 entries like 1"),
        (lambda: up(2, 2, 3, padding=(1,)), r"got padding=\(1,\); needed a tuple of 1 entries like \(0, 0\)"),
        (lambda: up(2, 2, 3, stride=(2, 2)), r"got stride=\(2, 2\); needed a tuple of 1 entries like 1"),
        (lambda: up(2, 2, 3, stride=(0,)), "needs stride and dilation >= 1"),
        (lambda: up(2, 2, 3, dilation=(0,)), "needs stride and dilation >= 1"),
    ],
)
def test_tensors_and_geometry_that_do_not_fit_are_refused_with_a_reason(build, reason):
    with pytest.raises(FoldError, match=reason):
        build()


@pytest.mark.parametrize(
    "module",
    [
        conv_norm_up(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Sequential(nn.Dropout2d(), conv_norm_up(4, 6, 4, stride=2, padding=1), nn.Conv2d(6, 3, 1, bias=False)),
        nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), conv_norm_up(8, 6, 2, stride=2), nn.Identity()),
        nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)),
        Sum([conv_norm_up(4, 6, 4, stride=2, padding=1), conv_norm_up(4, 6, 2, stride=2, groups=2)]),
        Sum([conv_norm_up(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Identity(), nn.Conv2d(4, 4, 1)]),
        Concat([conv_norm_up(4, 2, (4, 2), stride=2, padding=(1, 0)), conv_norm_up(4, 3, 2, stride=2)]),
        SplitConcat([conv_norm_up(1, 2, 2, stride=2), conv_norm_up(3, 6, 2, stride=2, groups=3)], (1, 3)),
    ],
    ids=str,
)
def test_modules_with_transposed_convs_fold_to_one_of_them(module):
    module, x = prepared(module), randn(1, 3, 4, 5, 6)
    value = pytree.tree_map_only(Tensor, Tensor.detach, fold(module))
    with torch.no_grad():
        assert_value_is(value, x, module(x))


@pytest.mark.parametrize(
    "misread",
    [
        lambda conv: absorb_shortcut([conv], []),
        to_linear,
        lambda conv: to_matrix(conv, (5,)),
        lambda conv: BranchConv([conv.to_module()]),
    ],
)
def test_what_takes_ordinary_convs_refuses_a_transposed_one(misread):
    with pytest.raises(FoldError, match=r"is a transposed convolution; needed an ordinary one"):
        misread(up(2, 2, 3, padding=((1, 1),)))


def test_a_hooked_or_overriding_transposed_module_is_refused():
    class Doubled(nn.ConvTranspose2d):
        def forward(self, input, output_size=None):
            return 2 * super().forward(input, output_size)

    hooked = nn.ConvTranspose2d(2, 2, 3)
    hooked.register_forward_hook(lambda *_: None)
    for module in (Doubled(2, 2, 3), hooked):
        with pytest.raises(FoldError):
            fold(module)
        with pytest.raises(FoldError, match="build its AffineConvTranspose from its weight and geometry"):
            AffineConvTranspose.from_module(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_transposed_value_keeps_its_dtype(dtype):
    module = prepared(conv_norm_up(4, 6, 3, stride=2)).to(dtype)
    value = fold(module)
    assert value.weight.dtype == value.bias.dtype == value.to_module().weight.dtype == dtype
    assert value.to(dtype=torch.float64).bias.dtype == torch.float64


def test_a_transposed_module_is_made_in_the_dtype_and_on_the_device_asked_for():
    conv = up(2, 3, 3, bias=randn(2, 3))
    cast = conv.to_module(dtype=torch.float16)
    assert torch.equal(cast.weight, conv.weight.half())
    assert torch.equal(cast.bias, conv.bias.half())
    assert {p.device.type for p in conv.to_module(device="meta").parameters()} == {"meta"}


def test_a_transposed_module_that_folds_in_forward_compiles():
    torch.compiler.reset()
    module, x = prepared(conv_norm_up(2, 4, 3, stride=2, padding=1)), randn(1, 2, 2, 4, 5)
    compiled = torch.compile(lambda y: fold(module)(y), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_same(module(x), compiled(x))


def test_a_transposed_value_tells_its_geometry():
    conv = up(4, 3, 3, 2, stride=(2, 1), padding=((1, 0), (0, -1)), groups=2, bias=randn(1, 6))
    assert repr(conv) == (
        "AffineConvTranspose(4->6, kernel_size=(3, 2), stride=(2, 1), padding=((1, 0), (0, -1)), groups=2, bias)"
    )
    assert conv.pads
